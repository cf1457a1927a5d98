//! Session tokens: a time and a keyed hash of it, so that any number of them takes no memory.
//!
//! A token keeps a request that a program in the guest was tricked into from reaching the metadata; it is
//! no secret between guest and host. The key is made when the first token is, and never leaves the
//! process: a restored clone has its own, and tokens of before the snapshot are void.

use std::io;
use std::time::{Duration, Instant};

use hmac::{Hmac, KeyInit, Mac};
use sha2::Sha256;

/// How long a token may live, in seconds.
pub(super) const TTL_SECONDS: std::ops::RangeInclusive<u32> = 1..=21_600;

/// Bytes of the hash that are in the token.
const TAG_LEN: usize = 16;

/// Makes and checks tokens.
#[derive(Default)]
pub(super) struct Tokens(Option<Key>);

struct Key {
    hmac: Hmac<Sha256>,
    /// Times in tokens are milliseconds since this.
    epoch: Instant,
}

impl std::fmt::Debug for Tokens {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Tokens")
    }
}

impl Key {
    fn new(now: Instant) -> io::Result<Self> {
        let mut secret = [0; 32];
        // SAFETY: the pointer and length are those of a live array.
        let got = unsafe { libc::getrandom(secret.as_mut_ptr().cast(), secret.len(), 0) };
        if usize::try_from(got) != Ok(secret.len()) {
            return Err(io::Error::last_os_error());
        }
        let hmac = Hmac::new_from_slice(&secret).map_err(io::Error::other)?;
        Ok(Self { hmac, epoch: now })
    }

    fn tag(&self, expiry: u64) -> Hmac<Sha256> {
        self.hmac.clone().chain_update(expiry.to_be_bytes())
    }

    fn millis(&self, time: Instant) -> u64 {
        u64::try_from(time.saturating_duration_since(self.epoch).as_millis()).unwrap_or(u64::MAX)
    }
}

impl Tokens {
    /// A token that is valid for `ttl_seconds` from `now`, which must be in [`TTL_SECONDS`].
    pub fn create(&mut self, ttl_seconds: u32, now: Instant) -> io::Result<String> {
        let key = match &mut self.0 {
            Some(key) => key,
            none => none.insert(Key::new(now)?),
        };
        let expiry = key.millis(now + Duration::from_secs(u64::from(ttl_seconds)));
        let tag = key.tag(expiry).finalize().into_bytes();
        let bytes = expiry.to_be_bytes().into_iter().chain(tag.into_iter().take(TAG_LEN));
        Ok(bytes.map(|byte| format!("{byte:02x}")).collect())
    }

    /// Whether a token was made here and is still valid.
    pub fn is_valid(&self, token: &str, now: Instant) -> bool {
        let Some(key) = &self.0 else { return false };
        let Some(bytes) = from_hex::<{ 8 + TAG_LEN }>(token) else { return false };
        let Some((expiry, tag)) = bytes.split_first_chunk::<8>() else { return false };
        let expiry = u64::from_be_bytes(*expiry);
        key.tag(expiry).verify_truncated_left(tag).is_ok() && key.millis(now) < expiry
    }
}

/// Exactly `N` bytes in lower-case hexadecimal.
fn from_hex<const N: usize>(text: &str) -> Option<[u8; N]> {
    let text = text.as_bytes();
    if text.len() != 2 * N {
        return None;
    }
    let digit = |c: u8| match c {
        b'0'..=b'9' => Some(c - b'0'),
        b'a'..=b'f' => Some(c - b'a' + 10),
        _ => None,
    };
    let mut bytes = [0; N];
    for (byte, pair) in bytes.iter_mut().zip(text.chunks_exact(2)) {
        *byte = digit(pair[0])? << 4 | digit(pair[1])?;
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_expire_and_cannot_be_changed() {
        let now = Instant::now();
        let mut tokens = Tokens::default();
        assert!(!tokens.is_valid(&"0".repeat(48), now));
        let token = tokens.create(10, now).unwrap();
        assert!(tokens.is_valid(&token, now));
        assert!(tokens.is_valid(&token, now + Duration::from_millis(9_999)));
        assert!(!tokens.is_valid(&token, now + Duration::from_secs(10)));
        for at in 0..token.len() {
            let other = if &token[at..=at] == "0" { "1" } else { "0" };
            let changed = format!("{}{other}{}", &token[..at], &token[at + 1..]);
            assert!(!tokens.is_valid(&changed, now), "{at}");
        }
        for bad in ["", &token[1..], &format!("{token}0"), &"é".repeat(24)] {
            assert!(!tokens.is_valid(bad, now), "{bad}");
        }
        // Another process has another key.
        let mut other = Tokens::default();
        other.create(10, now).unwrap();
        assert!(!other.is_valid(&token, now));
    }
}
