use super::*;

fn query(name: &[&[u8]], kind: u16) -> Vec<u8> {
    let mut bytes = vec![0x12, 0x34, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
    for label in name {
        bytes.push(label.len() as u8);
        bytes.extend_from_slice(label);
    }
    bytes.push(0);
    bytes.extend_from_slice(&kind.to_be_bytes());
    bytes.extend_from_slice(&[0, 1]);
    bytes
}

#[test]
fn the_question_is_read() {
    let bytes = query(&[b"WEB", b"red", b"internal"], 1);
    let question = Question::parse(&bytes).unwrap();
    assert_eq!((question.id, question.name.as_deref()), (0x1234, Some("web.red.internal")));
    assert_eq!((question.wanted(), question.bytes.as_slice()), (Wanted::Address, &bytes[12..]));
    assert_eq!(Question::parse(&query(&[], 1)).unwrap().name.as_deref(), Some(""));
    assert_eq!(Question::parse(&query(&[b"a"], 12)).unwrap().wanted(), Wanted::Name);
    assert_eq!(Question::parse(&query(&[b"a"], 28)).unwrap().wanted(), Wanted::Other);
    // A dot in a label is not the one between labels.
    assert_eq!(Question::parse(&query(&[b"web.red", b"internal"], 1)).unwrap().name, None);
    assert_eq!(Question::parse(&query(&[b"\xff"], 1)).unwrap().name, None);
}

#[test]
fn what_is_no_query_gets_what_it_deserves() {
    let good = query(&[b"web"], 1);
    for length in 0..HEADER {
        assert_eq!(Question::parse(&good[..length]), Err(Unfit::Silent), "{length}");
    }
    let code = |bytes: &[u8]| match Question::parse(bytes) {
        Err(Unfit::Answer(answer)) => {
            assert_eq!((answer.len(), &answer[..2]), (HEADER, &bytes[..2]));
            answer[3] & 0xf
        }
        other => panic!("{other:?}"),
    };
    for length in HEADER..good.len() {
        assert_eq!(code(&good[..length]), Code::FormatError as u8, "{length}");
    }
    let changed = |place: usize, value| {
        let mut bytes = good.clone();
        bytes[place] = value;
        bytes
    };
    // An answer; another operation; none or several questions.
    assert_eq!(Question::parse(&changed(2, 0x81)), Err(Unfit::Silent));
    assert_eq!(code(&changed(2, 0x28)), Code::NotImplemented as u8);
    assert_eq!(code(&changed(5, 0)), Code::FormatError as u8);
    assert_eq!(code(&changed(5, 2)), Code::FormatError as u8);
    // A pointer, to itself even; a label of an unknown kind; a name that is too long.
    assert_eq!(code(&changed(12, 0xc0)), Code::FormatError as u8);
    assert_eq!(code(&changed(12, 0x40)), Code::FormatError as u8);
    let label = [b'a'; 63];
    let long: [&[u8]; 4] = [&label, &label, &label, &label];
    assert_eq!(code(&query(&long, 1)), Code::FormatError as u8);
    let fits: [&[u8]; 4] = [&label, &label, &label, &label[..61]];
    assert!(Question::parse(&query(&fits, 1)).is_ok());
}

#[test]
fn answers_are_laid_out_as_resolvers_read_them() {
    let question = Question::parse(&query(&[b"web"], 1)).unwrap();
    let bytes = question.addresses(&[[10, 0, 0, 4].into()], MAX_UDP);
    #[rustfmt::skip]
    let expected = [
        0x12, 0x34, 0x85, 0x80, 0, 1, 0, 1, 0, 0, 0, 0,
        3, b'w', b'e', b'b', 0, 0, 1, 0, 1,
        0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 5, 0, 4, 10, 0, 0, 4,
    ];
    assert_eq!(bytes, expected);
    let bytes = question.nothing(Code::NoSuchName, "r.i");
    #[rustfmt::skip]
    let expected = [
        0x12, 0x34, 0x85, 0x83, 0, 1, 0, 0, 0, 1, 0, 0,
        3, b'w', b'e', b'b', 0, 0, 1, 0, 1,
        1, b'r', 1, b'i', 0, 0, 6, 0, 1, 0, 0, 0, 5, 0, 30,
        1, b'r', 1, b'i', 0, 1, b'r', 1, b'i', 0,
        0, 0, 0, 1, 0, 0, 0x0e, 0x10, 0, 0, 2, 0x58, 0, 1, 0x51, 0x80, 0, 0, 0, 5,
    ];
    assert_eq!(bytes, expected);
    let bytes = question.refuse(Code::Refused);
    assert_eq!((bytes.len(), &bytes[2..4]), (21, &[0x81, 0x85][..]));
    assert_eq!(question.name("a.b")[33..], [1, b'a', 1, b'b', 0]);
}

#[test]
fn an_answer_that_does_not_fit_says_so() {
    let question = Question::parse(&query(&[b"web"], 1)).unwrap();
    let many: Vec<_> = (0..100).map(|i| Ipv4Addr::new(10, 0, 0, i)).collect();
    let bytes = question.addresses(&many, MAX_UDP);
    assert!(bytes.len() <= MAX_UDP);
    assert_eq!((bytes[2] & 2, bytes[7]), (2, 30));
    let bytes = question.addresses(&many, 65_535);
    assert_eq!((bytes[2] & 2, bytes[7]), (0, 100));
    assert_eq!(question.truncated()[2] & 2, 2);
}

#[test]
fn only_an_answer_to_the_question_is_one() {
    let question = Question::parse(&query(&[b"web"], 1)).unwrap();
    let good = question.addresses(&[[10, 0, 0, 4].into()], MAX_UDP);
    assert!(question.is_answered_by(&good));
    for place in [0, 1, 13, 18, 20] {
        let mut bad = good.clone();
        bad[place] ^= 1;
        assert!(!question.is_answered_by(&bad), "{place}");
    }
    assert!(!question.is_answered_by(&query(&[b"web"], 1)), "a query");
    for length in 0..21 {
        assert!(!question.is_answered_by(&good[..length]), "{length}");
    }
    // A failure may come without the question.
    assert!(question.is_answered_by(&header(0x1234, 0, Code::Refused, [0; 4])));
    assert!(!question.is_answered_by(&header(0x1234, 0, Code::NoError, [0; 4])));
}
