//! The little of DNS (RFC 1035) that is needed: the question of a query, and answers to questions about guests.
//! Everything else passes through as it came.
//!
//! Of what guests send only the header and the one question are read; nothing follows compression pointers.

use std::net::Ipv4Addr;

/// Length of the header (RFC 1035, section 4.1.1).
const HEADER: usize = 12;
/// Longest name, with the lengths of its labels (section 2.3.4).
const MAX_NAME: usize = 255;
const MAX_LABEL: u8 = 63;
/// Longest answer by UDP if the query does not say otherwise (section 2.3.4).
pub const MAX_UDP: usize = 512;

const IN: u16 = 1;
const TYPE_A: u16 = 1;
const TYPE_SOA: u16 = 6;
const TYPE_PTR: u16 = 12;
const TYPE_ANY: u16 = 255;

const FLAG_RESPONSE: u16 = 1 << 15;
const FLAG_OPCODE: u16 = 0xf << 11;
const FLAG_AUTHORITATIVE: u16 = 1 << 10;
const FLAG_TRUNCATED: u16 = 1 << 9;
const FLAG_RECURSION_DESIRED: u16 = 1 << 8;
const FLAG_RECURSION_AVAILABLE: u16 = 1 << 7;

/// Seconds for which an answer may be kept: guests come and go.
const TTL: u32 = 5;

/// Response codes (section 4.1.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Code {
    NoError = 0,
    FormatError = 1,
    ServerFailure = 2,
    NoSuchName = 3,
    NotImplemented = 4,
    Refused = 5,
}

/// A query's one question.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Question {
    pub id: u16,
    flags: u16,
    /// Labels in lower case with dots between; empty for the root. None if a label has bytes that could be
    /// taken for something else: such a name is not ours.
    pub name: Option<String>,
    kind: u16,
    class: u16,
    /// The question as it came, to be repeated in the answer.
    bytes: Vec<u8>,
}

/// What a question asks about guests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wanted {
    Address,
    Name,
    /// Something that no guest has.
    Other,
}

/// Why a message is not a query to be answered from its question.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Unfit {
    /// Too short to be answered, or an answer itself.
    Silent,
    /// Gets this answer.
    Answer(Vec<u8>),
}

impl Question {
    /// Reads a query.
    ///
    /// # Errors
    ///
    /// What to do instead of answering.
    pub fn parse(message: &[u8]) -> Result<Self, Unfit> {
        let number = |at: usize| {
            let bytes = message.get(at..at + 2).and_then(|b| b.try_into().ok());
            bytes.map(u16::from_be_bytes).ok_or(Unfit::Silent)
        };
        let (id, flags, questions) = (number(0)?, number(2)?, number(4)?);
        if message.len() < HEADER || flags & FLAG_RESPONSE != 0 {
            return Err(Unfit::Silent);
        }
        let refuse = |code| Unfit::Answer(header(id, flags, code, [0; 4]).to_vec());
        if flags & FLAG_OPCODE != 0 {
            return Err(refuse(Code::NotImplemented));
        }
        if questions != 1 {
            return Err(refuse(Code::FormatError));
        }
        let (name, end) = read_name(message).ok_or_else(|| refuse(Code::FormatError))?;
        let (kind, class) = match (number(end), number(end + 2)) {
            (Ok(kind), Ok(class)) => (kind, class),
            _ => return Err(refuse(Code::FormatError)),
        };
        let bytes = message[HEADER..end + 4].to_vec();
        Ok(Self { id, flags, name, kind, class, bytes })
    }

    /// What it asks about guests.
    pub fn wanted(&self) -> Wanted {
        match (self.class, self.kind) {
            (IN, TYPE_A | TYPE_ANY) => Wanted::Address,
            (IN, TYPE_PTR) => Wanted::Name,
            _ => Wanted::Other,
        }
    }

    /// Whether a message of another server's is an answer to this question.
    pub fn is_answered_by(&self, message: &[u8]) -> bool {
        let same = |from: usize, bytes: &[u8]| message.get(from..from + bytes.len()) == Some(bytes);
        let asked = same(HEADER, &self.bytes) && same(4, &[0, 1]);
        // Errors may come without it.
        let failed = message.len() >= HEADER && same(4, &[0, 0]) && message[3] & 0xf != 0;
        let response = message.get(2).is_some_and(|flags| flags & 0x80 != 0);
        same(0, &self.id.to_be_bytes()) && response && (asked || failed)
    }

    /// An answer with no records.
    pub fn refuse(&self, code: Code) -> Vec<u8> {
        let mut bytes = header(self.id, self.flags, code, [1, 0, 0, 0]).to_vec();
        bytes.extend_from_slice(&self.bytes);
        bytes
    }

    /// An answer that says to ask again by TCP.
    pub fn truncated(&self) -> Vec<u8> {
        let mut bytes = self.refuse(Code::NoError);
        bytes[2] |= (FLAG_TRUNCATED >> 8) as u8;
        bytes
    }

    /// An answer with addresses, at most as many as fit into `limit` bytes.
    pub fn addresses(&self, addresses: &[Ipv4Addr], limit: usize) -> Vec<u8> {
        const RECORD: usize = 16;
        let room = limit.saturating_sub(HEADER + self.bytes.len()) / RECORD;
        let some = addresses.get(..room.min(addresses.len())).unwrap_or_default();
        let mut bytes = self.begin(Code::NoError, some.len(), 0);
        if some.len() < addresses.len() {
            bytes[2] |= (FLAG_TRUNCATED >> 8) as u8;
        }
        for address in some {
            record(&mut bytes, TYPE_A, &address.octets());
        }
        bytes
    }

    /// An answer with the name `name`, of labels with dots between.
    pub fn name(&self, name: &str) -> Vec<u8> {
        let mut bytes = self.begin(Code::NoError, 1, 0);
        record(&mut bytes, TYPE_PTR, &encode_name(name));
        bytes
    }

    /// An answer that says for sure that there is no such name, or ([`Code::NoError`]) nothing of what is asked
    /// for: with the record from which a client learns how long to believe it (RFC 2308, section 3).
    pub fn nothing(&self, code: Code, domain: &str) -> Vec<u8> {
        let mut bytes = self.begin(code, 0, 1);
        let zone = encode_name(domain);
        let mut data = zone.clone();
        data.extend_from_slice(&zone);
        // Serial, refresh, retry, expire, minimum.
        for number in [1, 3600, 600, 86_400, TTL] {
            data.extend_from_slice(&number.to_be_bytes());
        }
        bytes.extend_from_slice(&zone);
        record_after_name(&mut bytes, TYPE_SOA, &data);
        bytes
    }

    fn begin(&self, code: Code, answers: usize, authorities: u16) -> Vec<u8> {
        let answers = u16::try_from(answers).unwrap_or_default();
        let mut bytes = header(self.id, self.flags, code, [1, answers, authorities, 0]).to_vec();
        bytes[2] |= (FLAG_AUTHORITATIVE >> 8) as u8;
        bytes.extend_from_slice(&self.bytes);
        bytes
    }
}

/// The header of an answer to a query with these `flags`.
fn header(id: u16, flags: u16, code: Code, counts: [u16; 4]) -> [u8; HEADER] {
    let kept = flags & (FLAG_OPCODE | FLAG_RECURSION_DESIRED);
    let flags = FLAG_RESPONSE | FLAG_RECURSION_AVAILABLE | kept | code as u16;
    let mut bytes = [0; HEADER];
    for (place, number) in bytes.chunks_exact_mut(2).zip([id, flags].into_iter().chain(counts)) {
        place.copy_from_slice(&number.to_be_bytes());
    }
    bytes
}

/// A record about the name that is asked for.
fn record(bytes: &mut Vec<u8>, kind: u16, data: &[u8]) {
    // A pointer to the question's name.
    bytes.extend_from_slice(&[0xc0, HEADER as u8]);
    record_after_name(bytes, kind, data);
}

fn record_after_name(bytes: &mut Vec<u8>, kind: u16, data: &[u8]) {
    bytes.extend_from_slice(&kind.to_be_bytes());
    bytes.extend_from_slice(&IN.to_be_bytes());
    bytes.extend_from_slice(&TTL.to_be_bytes());
    // Two names and some numbers at most.
    bytes.extend_from_slice(&u16::try_from(data.len()).unwrap_or_default().to_be_bytes());
    bytes.extend_from_slice(data);
}

/// The name at the start of the question, and where it ends.
fn read_name(message: &[u8]) -> Option<(Option<String>, usize)> {
    let mut at = HEADER;
    let mut name = Some(String::new());
    loop {
        let length = *message.get(at)?;
        if length > MAX_LABEL {
            return None;
        }
        at += 1;
        if length == 0 {
            return (at - HEADER <= MAX_NAME).then_some((name, at));
        }
        let label = message.get(at..at + usize::from(length))?;
        at += usize::from(length);
        if at - HEADER > MAX_NAME {
            return None;
        }
        let plain = |b: &u8| b.is_ascii_alphanumeric() || *b == b'-' || *b == b'_';
        if !label.iter().all(plain) {
            name = None;
        }
        if let Some(name) = &mut name {
            if !name.is_empty() {
                name.push('.');
            }
            name.extend(label.iter().map(|byte| char::from(byte.to_ascii_lowercase())));
        }
    }
}

/// `name`, of labels with dots between that are short enough.
fn encode_name(name: &str) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(name.len() + 2);
    for label in name.split('.').filter(|label| !label.is_empty()) {
        bytes.push(u8::try_from(label.len()).unwrap_or(MAX_LABEL).min(MAX_LABEL));
        bytes.extend(label.bytes().take(usize::from(MAX_LABEL)));
    }
    bytes.push(0);
    bytes
}

#[cfg(test)]
#[path = "message_tests.rs"]
mod tests;
