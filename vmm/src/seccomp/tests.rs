//! The filters, interpreted: what the kernel would make of them.

use libc::{SECCOMP_RET_ALLOW, SECCOMP_RET_ERRNO, SECCOMP_RET_KILL_PROCESS, SECCOMP_RET_TRAP, sock_filter};

use super::compile::Test::{Is, Masked};
use super::compile::{Rule, Test, Verdict, allow, allow_if, compile, len};
use super::{Thread, policy};

const X86_64: u32 = 0xc000_003e;

/// Runs a filter as the kernel does; and how many instructions that took.
fn interpret(filter: &[sock_filter], architecture: u32, number: u32, arguments: [u64; 6]) -> (u32, usize) {
    let mut data = Vec::new();
    data.extend_from_slice(&number.to_le_bytes());
    data.extend_from_slice(&architecture.to_le_bytes());
    data.extend_from_slice(&0_u64.to_le_bytes());
    arguments.iter().for_each(|argument| data.extend_from_slice(&argument.to_le_bytes()));
    let (mut at, mut register, mut steps) = (0, 0_u32, 0);
    loop {
        let sock_filter { code, jt, jf, k } = filter[at];
        at += 1;
        steps += 1;
        let branch = |condition| usize::from(if condition { jt } else { jf });
        match code {
            0x20 => {
                let bytes = data[k as usize..k as usize + 4].try_into().unwrap();
                register = u32::from_le_bytes(bytes);
            }
            0x54 => register &= k,
            0x15 => at += branch(register == k),
            0x35 => at += branch(register >= k),
            0x06 => return (k, steps),
            other => panic!("instruction {other:#x}"),
        }
    }
}

fn passes(test: &Test, value: u32) -> bool {
    match *test {
        Is(wanted) => value == wanted,
        Masked(mask, wanted) => value & mask == wanted,
    }
}

/// What the rules say, read plainly.
fn expected(groups: &[&[Rule]], number: u32, arguments: [u64; 6]) -> u32 {
    match groups.concat().iter().find(|rule| rule.call == i64::from(number)).map(|rule| rule.verdict) {
        None => SECCOMP_RET_TRAP,
        Some(Verdict::Allow) => SECCOMP_RET_ALLOW,
        Some(Verdict::Fail(errno)) => SECCOMP_RET_ERRNO | u32::from(errno),
        Some(Verdict::If(index, tests)) => {
            let value = arguments[usize::from(index)] as u32;
            if tests.iter().any(|test| passes(test, value)) { SECCOMP_RET_ALLOW } else { SECCOMP_RET_TRAP }
        }
    }
}

/// Compares a filter with its rules for every number, and for each argument that a test names and ones
/// beside it.
fn check(filter: &[sock_filter], groups: &[&[Rule]]) {
    let mut values: Vec<u64> = vec![0, 1, u64::from(u32::MAX), u64::MAX];
    for rule in groups.concat() {
        if let Verdict::If(_, tests) = rule.verdict {
            for test in tests {
                let (Is(value) | Masked(_, value)) = *test;
                let value = u64::from(value);
                values.extend([value, value + 1, value.wrapping_sub(1), value ^ 4, value | 1 << 32]);
                values.push(value | u64::from(if let Masked(mask, _) = *test { !mask } else { 0 }));
            }
        }
    }
    values.sort();
    values.dedup();
    for number in (0..1024).chain([0x4000_0000, 0x4000_0001, u32::MAX]) {
        for value in &values {
            for index in 0..6 {
                let mut arguments = [0x5a5a_5a5a_5a5a_5a5a; 6];
                arguments[index] = *value;
                let (verdict, _) = interpret(filter, X86_64, number, arguments);
                assert_eq!(verdict, expected(groups, number, arguments), "{number} {arguments:x?}");
            }
        }
    }
}

#[test]
fn filters_do_what_their_rules_say() {
    const FEW: &[&[Rule]] =
        &[&[allow(3)], &[allow_if(5, 1, &[Masked(4, 0), Is(7), Is(12)]), allow(4), allow(0)]];
    const ONE: &[&[Rule]] = &[&[allow(libc::SYS_exit)]];
    check(&compile::<{ len(ONE) }>(ONE), ONE);
    check(&compile::<{ len(FEW) }>(FEW), FEW);
    for thread in [Thread::Setup, Thread::Vmm, Thread::Vcpu] {
        check(thread.filter(), policy::rules(thread));
    }
}

#[test]
fn other_architectures_end_the_process() {
    const I386: u32 = 0x4000_0003;
    for thread in [Thread::Setup, Thread::Vmm, Thread::Vcpu] {
        for number in 0..512 {
            assert_eq!(interpret(thread.filter(), I386, number, [0; 6]).0, SECCOMP_RET_KILL_PROCESS);
        }
    }
}

/// A vCPU spends its life in one call; and turning a filter on costs as much as its steps for all numbers.
#[test]
fn filters_are_short_where_it_matters() {
    let run = [0, 0xae80, 0, 0, 0, 0];
    let (verdict, steps) = interpret(Thread::Vcpu.filter(), X86_64, libc::SYS_ioctl as u32, run);
    assert_eq!(verdict, SECCOMP_RET_ALLOW);
    assert!(steps <= 15, "{steps}");
    for thread in [Thread::Setup, Thread::Vmm, Thread::Vcpu] {
        let steps = |number| interpret(thread.filter(), X86_64, number, [0; 6]).1;
        let total: usize = (0..470).map(steps).sum();
        println!("{thread:?}: {} instructions, {total} steps for all numbers", thread.filter().len());
        assert!(total < 470 * 10, "{thread:?}: {total}");
    }
}

/// What a later filter allows and an earlier one does not would be lost.
#[test]
fn setup_allows_what_comes_after_it() {
    for thread in [Thread::Vmm, Thread::Vcpu] {
        for rule in policy::rules(thread).concat() {
            let values: Vec<u32> = match rule.verdict {
                Verdict::If(_, tests) => tests
                    .iter()
                    .map(|test| match *test {
                        Is(value) | Masked(_, value) => value,
                    })
                    .collect(),
                _ => vec![0],
            };
            for value in values {
                let arguments = [u64::from(value); 6];
                let number = rule.call as u32;
                assert_eq!(interpret(Thread::Setup.filter(), X86_64, number, arguments).0, SECCOMP_RET_ALLOW);
            }
        }
    }
}
