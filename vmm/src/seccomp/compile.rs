//! Makes filters for the kernel's packet filter machine out of lists of rules, at compile time.
//!
//! Turning a filter on is not free: the kernel translates it to machine code, and runs it once for every
//! number there is to learn which calls need no looking at later. So filters are made short, and find the
//! rule of a call by bisection of the numbers: the many without a rule in few steps.
//!
//! ```text
//!     other architecture? end the process
//!     number >= 148 ? ──yes──▶ number >= 294 ? …
//!         │no                                        ┌──▶ violation
//!     number >= 16 ? ──yes──▶ number >= 17 ? ──yes───┘ ┌▶ allow
//!         │no                     │no: argument 1 is KVM_RUN ?
//! ```

use libc::sock_filter;

/// What to do with one system call.
#[derive(Clone, Copy)]
pub struct Rule {
    /// Its number, `SYS_…`.
    pub call: libc::c_long,
    /// What becomes of it.
    pub verdict: Verdict,
}

/// What becomes of a system call that has a rule. One without is a violation.
#[derive(Clone, Copy)]
pub enum Verdict {
    /// It is made.
    Allow,
    /// It fails with this error number: the caller knows another way.
    Fail(u16),
    /// It is made if the argument of that index passes one of the tests, and is a violation otherwise.
    If(u8, &'static [Test]),
}

/// A test of the lower 32 bits of an argument, which are all of it for what the kernel takes as an `int`.
#[derive(Clone, Copy)]
pub enum Test {
    /// It is this.
    Is(u32),
    /// Of the bits in the first, those in the second are set and no others.
    Masked(u32, u32),
}

/// It is made whatever its arguments.
pub const fn allow(call: libc::c_long) -> Rule {
    Rule { call, verdict: Verdict::Allow }
}

/// It is made if the argument with this index (from 0) passes one of the tests.
pub const fn allow_if(call: libc::c_long, argument: u8, tests: &'static [Test]) -> Rule {
    assert!(argument < 6 && !tests.is_empty() && tests.len() < 64);
    Rule { call, verdict: Verdict::If(argument, tests) }
}

/// Instructions of the filter that [`compile`] makes of the same rules.
pub const fn len(groups: &[&[Rule]]) -> usize {
    let segments = segments(groups);
    HEADER + tree_len(&segments, 0, segments.count) + TARGETS
}

/// The filter that lets through what is in the rules. The same call in two rules does not compile, nor do
/// more rules than one conditional jump spans.
pub const fn compile<const LEN: usize>(groups: &[&[Rule]]) -> [sock_filter; LEN] {
    let segments = segments(groups);
    let mut out = Program { code: [instruction(RETURN, 0, 0, libc::SECCOMP_RET_ALLOW); LEN], len: 0 };
    out.push(LOAD, 0, 0, ARCHITECTURE);
    out.push(EQUAL, 1, 0, AUDIT_ARCH);
    out.push(RETURN, 0, 0, libc::SECCOMP_RET_KILL_PROCESS);
    out.push(LOAD, 0, 0, NUMBER);
    out.tree(&segments, 0, segments.count);
    out.push(RETURN, 0, 0, libc::SECCOMP_RET_TRAP);
    assert!(out.len + 1 == LEN);
    out.code
}

/// The only one this program is built for: calls by another one's numbers end the process.
const AUDIT_ARCH: u32 = 0xc000_003e; // AUDIT_ARCH_X86_64 of linux/audit.h

// Offsets in `struct seccomp_data` of linux/seccomp.h.
const NUMBER: u32 = 0;
const ARCHITECTURE: u32 = 4;
const ARGUMENTS: u32 = 16;

// Instructions, see linux/bpf_common.h.
const LOAD: u32 = libc::BPF_LD | libc::BPF_W | libc::BPF_ABS;
const AND: u32 = libc::BPF_ALU | libc::BPF_AND | libc::BPF_K;
const EQUAL: u32 = libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K;
const AT_LEAST: u32 = libc::BPF_JMP | libc::BPF_JGE | libc::BPF_K;
const RETURN: u32 = libc::BPF_RET | libc::BPF_K;

/// Instructions before the tree, and the two behind it to which all of it jumps: violation and allow.
const HEADER: usize = 4;
const TARGETS: usize = 2;

const fn instruction(code: u32, jt: u8, jf: u8, k: u32) -> sock_filter {
    sock_filter { code: code as u16, jt, jf, k }
}

/// The numbers of system calls cut where what happens to them changes: a segment reaches to the start of
/// the next one. No verdict is a violation.
struct Segments {
    start: [u32; Self::MAX],
    verdict: [Option<Verdict>; Self::MAX],
    count: usize,
}

impl Segments {
    const MAX: usize = 512;

    const fn push(&mut self, start: u32, verdict: Option<Verdict>) {
        if let (Some(Verdict::Allow), true) = (verdict, self.count > 0)
            && let Some(Verdict::Allow) = self.verdict[self.count - 1]
        {
            return;
        }
        self.start[self.count] = start;
        self.verdict[self.count] = verdict;
        self.count += 1;
    }
}

const fn segments(groups: &[&[Rule]]) -> Segments {
    let mut segments = Segments { start: [0; Segments::MAX], verdict: [None; Segments::MAX], count: 0 };
    let mut next: u32 = 0;
    while let Some(rule) = first_from(groups, next) {
        if rule.call as u32 != next {
            segments.push(next, None);
        }
        segments.push(rule.call as u32, Some(rule.verdict));
        next = rule.call as u32 + 1;
    }
    segments.push(next, None);
    segments
}

/// The rule with the lowest number from `from` on.
const fn first_from(groups: &[&[Rule]], from: u32) -> Option<Rule> {
    let mut found: Option<Rule> = None;
    let mut group = 0;
    while group < groups.len() {
        let rules = groups[group];
        let mut index = 0;
        while index < rules.len() {
            let rule = rules[index];
            assert!(rule.call >= 0 && rule.call < 1 << 30);
            if rule.call as u32 >= from {
                match found {
                    Some(best) if rule.call > best.call => {}
                    Some(best) => {
                        assert!(rule.call != best.call, "a system call has two rules");
                        found = Some(rule);
                    }
                    None => found = Some(rule),
                }
            }
            index += 1;
        }
        group += 1;
    }
    found
}

/// The segment among `low..high` (not the first) at whose start to cut: about half of the numbers lie below.
const fn cut(segments: &Segments, low: usize, high: usize) -> usize {
    let end = if high < segments.count { segments.start[high] } else { NUMBERS };
    let half = segments.start[low].midpoint(end);
    let mut best = low + 1;
    while best + 1 < high && segments.start[best + 1].abs_diff(half) <= segments.start[best].abs_diff(half) {
        best += 1;
    }
    best
}

/// About as many system calls as there are.
const NUMBERS: u32 = 470;

/// Instructions that the segments `low..high` take: none if all that is to be done is to jump to a target.
const fn tree_len(segments: &Segments, low: usize, high: usize) -> usize {
    if high - low == 1 {
        return match segments.verdict[low] {
            None | Some(Verdict::Allow) => 0,
            Some(Verdict::Fail(_)) => 1,
            Some(Verdict::If(_, tests)) => tests_len(tests),
        };
    }
    let cut = cut(segments, low, high);
    1 + tree_len(segments, low, cut) + tree_len(segments, cut, high)
}

const fn tests_len(tests: &[Test]) -> usize {
    let (mut len, mut index) = (0, 0);
    while index < tests.len() {
        len += match tests[index] {
            Test::Masked(..) => 3,
            Test::Is(_) if loads(tests, index) => 2,
            Test::Is(_) => 1,
        };
        index += 1;
    }
    len
}

/// Whether a test has to load the argument: the one before has not left it there.
const fn loads(tests: &[Test], index: usize) -> bool {
    index == 0 || matches!(tests[index], Test::Masked(..)) || matches!(tests[index - 1], Test::Masked(..))
}

struct Program<const LEN: usize> {
    code: [sock_filter; LEN],
    len: usize,
}

impl<const LEN: usize> Program<LEN> {
    const fn push(&mut self, code: u32, jt: u8, jf: u8, k: u32) {
        self.code[self.len] = instruction(code, jt, jf, k);
        self.len += 1;
    }

    /// The distance from the next instruction to the target for calls that are allowed, or are violations.
    const fn to_target(&self, allowed: bool) -> u8 {
        let distance = LEN - 1 - self.len - 1 - if allowed { 0 } else { 1 };
        assert!(distance <= u8::MAX as usize, "too many rules for one filter");
        distance as u8
    }

    const fn tree(&mut self, segments: &Segments, low: usize, high: usize) {
        if high - low == 1 {
            match segments.verdict[low] {
                None | Some(Verdict::Allow) => {}
                Some(Verdict::Fail(errno)) => {
                    self.push(RETURN, 0, 0, libc::SECCOMP_RET_ERRNO | errno as u32);
                }
                Some(Verdict::If(argument, tests)) => self.tests(argument, tests),
            }
            return;
        }
        let cut = cut(segments, low, high);
        let lower = tree_len(segments, low, cut);
        assert!(lower <= u8::MAX as usize, "too many rules for one filter");
        // What takes instructions follows, the lower part first.
        let jf = if lower == 0 { self.to_target(segments.verdict[low].is_some()) } else { 0 };
        let upper = tree_len(segments, cut, high);
        let jt = if upper == 0 { self.to_target(segments.verdict[cut].is_some()) } else { lower as u8 };
        self.push(AT_LEAST, jt, jf, segments.start[cut]);
        self.tree(segments, low, cut);
        self.tree(segments, cut, high);
    }

    const fn tests(&mut self, argument: u8, tests: &[Test]) {
        let mut index = 0;
        while index < tests.len() {
            if loads(tests, index) {
                // The lower half of a 64-bit number comes first.
                self.push(LOAD, 0, 0, ARGUMENTS + 8 * argument as u32);
            }
            let value = match tests[index] {
                Test::Is(value) => value,
                Test::Masked(mask, value) => {
                    self.push(AND, 0, 0, mask);
                    value
                }
            };
            let jf = if index + 1 == tests.len() { self.to_target(false) } else { 0 };
            self.push(EQUAL, self.to_target(true), jf, value);
            index += 1;
        }
    }
}
