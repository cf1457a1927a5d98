use super::*;

/// A small generator, so that a failing case can be run again from its seed.
struct Rng(u64);

impl Rng {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound as u64) as usize
    }
}

const KINDS: [Kind; 11] = [
    Kind::Hello,
    Kind::Request,
    Kind::Reply,
    Kind::Error,
    Kind::Control,
    Kind::Event,
    Kind::Stdin,
    Kind::Stdout,
    Kind::Stderr,
    Kind::FileData,
    Kind::FileEnd,
];

/// Yields its bytes in pieces of random size.
struct Pieces<'a> {
    bytes: &'a [u8],
    rng: Rng,
}

impl Read for Pieces<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let bound = buf.len().min(self.bytes.len());
        let n = if bound == 0 { 0 } else { 1 + self.rng.below(bound) };
        let (now, later) = self.bytes.split_at(n);
        buf[..n].copy_from_slice(now);
        self.bytes = later;
        Ok(n)
    }
}

fn read_all(mut from: impl Read) -> (Vec<(Kind, Vec<u8>)>, io::Result<()>) {
    let mut decoder = Decoder::new();
    let mut frames = Vec::new();
    loop {
        match decoder.read(&mut from) {
            Ok(Some((kind, payload))) => frames.push((kind, payload.to_vec())),
            Ok(None) => return (frames, Ok(())),
            Err(e) => return (frames, Err(e)),
        }
    }
}

fn frame_error(e: &io::Error) -> FrameError {
    e.get_ref().unwrap().downcast_ref::<FrameError>().unwrap().clone()
}

#[test]
fn the_wire_format_is_this() {
    let mut out = Vec::new();
    encode(&mut out, Kind::Stdout, b"hi").unwrap();
    encode(&mut out, Kind::FileEnd, b"").unwrap();
    assert_eq!(out, [2, 0, 0, 0, 17, b'h', b'i', 0, 0, 0, 0, 20]);
}

#[test]
fn frames_survive_any_cut() {
    for seed in 1..60 {
        let mut rng = Rng(seed);
        let mut bytes = Vec::new();
        let mut sent = Vec::new();
        for _ in 0..rng.below(30) {
            let kind = KINDS[rng.below(KINDS.len())];
            // Mostly small, sometimes the largest there can be.
            let len = match rng.below(10) {
                0 => kind.max_payload(),
                _ => rng.below(kind.max_payload().min(300) + 1),
            };
            let payload: Vec<u8> = (0..len).map(|i| (i as u64 ^ seed) as u8).collect();
            encode(&mut bytes, kind, &payload).unwrap();
            sent.push((kind, payload));
        }
        let (got, end) = read_all(Pieces { bytes: &bytes, rng });
        end.unwrap();
        assert!(got == sent, "seed {seed}");
    }
}

#[test]
fn a_stream_cut_inside_a_frame_is_truncated() {
    let mut bytes = Vec::new();
    encode(&mut bytes, Kind::Request, b"{}").unwrap();
    let whole = bytes.len();
    encode(&mut bytes, Kind::Stdin, b"abc").unwrap();
    for cut in 0..bytes.len() {
        let (frames, end) = read_all(&bytes[..cut]);
        assert_eq!(frames.len(), usize::from(cut >= whole), "cut at {cut}");
        if cut == 0 || cut == whole {
            end.unwrap();
        } else {
            let error = end.unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
            assert_eq!(frame_error(&error), FrameError::Truncated);
        }
    }
}

#[test]
fn a_length_past_the_limit_is_refused_before_its_bytes_come() {
    for kind in KINDS {
        let max = kind.max_payload();
        let len = u32::try_from(max + 1).unwrap();
        let mut bytes = len.to_le_bytes().to_vec();
        bytes.push(kind as u8);
        let mut decoder = Decoder::new();
        decoder.fill(&mut bytes.as_slice()).unwrap();
        let error = FrameError::TooLarge { kind, len: max + 1, max };
        assert_eq!(decoder.take().unwrap_err(), error);
        assert_eq!(decoder.take().unwrap_err(), error, "the stream stays unusable");
        assert_eq!(encode(&mut Vec::new(), kind, &vec![0; max + 1]).unwrap_err(), error);
    }
    let (_, end) = read_all(&[0xff, 0xff, 0xff, 0xff, 16][..]);
    assert_eq!(
        frame_error(&end.unwrap_err()),
        FrameError::TooLarge { kind: Kind::Stdin, len: u32::MAX as usize, max: MAX_DATA }
    );
}

#[test]
fn unknown_kinds_are_refused_and_known_ones_are_all_known() {
    for byte in 0..=255u8 {
        let (frames, end) = read_all(&[0, 0, 0, 0, byte][..]);
        match KINDS.iter().find(|kind| **kind as u8 == byte) {
            Some(kind) => assert_eq!(frames, [(*kind, vec![])]),
            None => assert_eq!(frame_error(&end.unwrap_err()), FrameError::UnknownKind(byte)),
        }
    }
}

/// Whatever the bytes: no panic, no more memory than the largest frame asks for, and what comes out are
/// exactly the frames at the front of the input.
#[test]
fn arbitrary_bytes_are_decoded_or_refused() {
    for seed in 1..3000 {
        let mut rng = Rng(seed);
        let mut bytes = Vec::new();
        while bytes.len() < 2000 && rng.below(20) != 0 {
            match rng.below(4) {
                0 => bytes.extend((0..rng.below(40)).map(|_| rng.next() as u8)),
                1 => bytes.extend([rng.below(20) as u8, 0, 0, 0, rng.below(22) as u8]),
                2 => bytes.extend([rng.next() as u8, rng.next() as u8, rng.below(20) as u8, 0, 2]),
                _ => encode(&mut bytes, KINDS[rng.below(10)], &vec![7; rng.below(200)]).unwrap(),
            }
        }
        let mut decoder = Decoder::new();
        let mut from = Pieces { bytes: &bytes, rng };
        let mut again = Vec::new();
        let end = loop {
            match decoder.read(&mut from) {
                Ok(Some((kind, payload))) => encode(&mut again, kind, payload).unwrap(),
                Ok(None) => break None,
                Err(e) => break Some(frame_error(&e)),
            }
            assert!(decoder.buf.len() <= 2 * (HEADER_LEN + MAX_MESSAGE), "seed {seed}");
        };
        assert!(bytes.starts_with(&again), "seed {seed}");
        let rest = &bytes[again.len()..];
        match end {
            None => assert!(rest.is_empty(), "seed {seed}"),
            Some(FrameError::UnknownKind(kind)) => assert_eq!(rest[4], kind, "seed {seed}"),
            Some(FrameError::TooLarge { len, max, .. }) => assert!(len > max, "seed {seed}"),
            Some(FrameError::Truncated) => assert!(!rest.is_empty(), "seed {seed}"),
        }
    }
}
