//! Names of images in registries, as people write them: `debian`, `ghcr.io/org/app:1.2`, `localhost:5000/a@sha256:…`.
//!
//! The grammar is that of the OCI distribution specification 1.1; that `debian` means
//! `docker.io/library/debian:latest` is Docker's convention.

use std::fmt;
use std::str::FromStr;

use crate::image::Digest;

/// An image in a registry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reference {
    /// Host, and port if one was given.
    pub registry: String,
    pub repository: String,
    pub tag: String,
    /// Which manifest it has to be; the tag says nothing then.
    pub digest: Option<Digest>,
}

/// Text is not a [`Reference`].
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is no name of a container image: {why} (examples: debian:12, ghcr.io/org/app:1.2)")]
pub struct ReferenceError {
    text: String,
    why: &'static str,
}

const DOCKER: &str = "docker.io";

impl FromStr for Reference {
    type Err = ReferenceError;

    fn from_str(text: &str) -> Result<Self, ReferenceError> {
        let bad = |why| ReferenceError { text: text.to_owned(), why };
        let (rest, digest) = match text.split_once('@') {
            Some((rest, digest)) => (rest, Some(digest.parse().map_err(|_| bad("its digest is malformed"))?)),
            None => (text, None),
        };
        let (registry, path) = match rest.split_once('/') {
            Some((first, path)) if first.contains(['.', ':']) || first == "localhost" => (first, path),
            _ => (DOCKER, rest),
        };
        let (repository, tag) = path.split_once(':').unwrap_or((path, "latest"));
        if !is_authority(registry) {
            return Err(bad("its registry is malformed"));
        }
        let part = |part: &str| {
            let fine = |byte: u8| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'.' | b'_' | b'-');
            let ends = |byte: Option<u8>| byte.is_some_and(|byte| byte.is_ascii_alphanumeric());
            part.bytes().all(fine) && ends(part.bytes().next()) && ends(part.bytes().last())
        };
        if repository.len() > 255 || !repository.split('/').all(part) {
            return Err(bad("its path must be of a-z, 0-9 and separators"));
        }
        let letter = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'_';
        let tag_is_fine = (1..=128).contains(&tag.len())
            && tag.bytes().all(|byte| letter(byte) || b".-".contains(&byte))
            && tag.bytes().next().is_some_and(letter);
        if !tag_is_fine {
            return Err(bad("its tag is malformed"));
        }
        let official = registry == DOCKER && !repository.contains('/');
        let repository = if official { format!("library/{repository}") } else { repository.to_owned() };
        Ok(Reference { registry: registry.to_owned(), repository, tag: tag.to_owned(), digest })
    }
}

/// Whether text is a host name or address, an IPv6 one in brackets, and maybe a port.
fn is_authority(text: &str) -> bool {
    let (host, port) = match text.rsplit_once(':') {
        Some((host, port)) if !port.contains(']') => (host, Some(port)),
        _ => (text, None),
    };
    let name = |host: &str| {
        host.starts_with(|first: char| first.is_ascii_alphanumeric())
            && host.bytes().all(|byte| byte.is_ascii_alphanumeric() || b".-".contains(&byte))
    };
    let address = |host: &str| {
        let inner = host.strip_prefix('[').and_then(|host| host.strip_suffix(']'));
        inner.is_some_and(|inner| inner.parse::<std::net::Ipv6Addr>().is_ok())
    };
    (name(host) || address(host)) && port.is_none_or(|port| port.parse::<u16>().is_ok())
}

impl Reference {
    /// Where the registry's API is.
    pub(super) fn host(&self) -> &str {
        match self.registry == DOCKER {
            true => "registry-1.docker.io",
            false => &self.registry,
        }
    }

    /// Whether the registry is on this host, so that nobody can listen in.
    pub(super) fn is_loopback(&self) -> bool {
        let host = self.registry.rsplit_once(':').map_or(self.registry.as_str(), |(host, _)| host);
        let host = host.trim_start_matches('[').trim_end_matches(']');
        host == "localhost" || host.parse::<std::net::IpAddr>().is_ok_and(|address| address.is_loopback())
    }

    /// What comes after `manifests/` in a URL.
    pub(super) fn selector(&self) -> String {
        self.digest.map_or_else(|| self.tag.clone(), |digest| digest.to_string())
    }

    /// The image without its registry.
    pub(super) fn image(&self) -> String {
        match &self.digest {
            Some(digest) => format!("{}@{digest}", self.repository),
            None => format!("{}:{}", self.repository, self.tag),
        }
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.registry, self.image())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn understands_what_people_write() {
        let shown = |text: &str| text.parse::<Reference>().map(|reference| reference.to_string());
        for (text, meant) in [
            ("debian", "docker.io/library/debian:latest"),
            ("debian:12-slim", "docker.io/library/debian:12-slim"),
            ("org/app", "docker.io/org/app:latest"),
            ("ghcr.io/org/team/app:v1.2", "ghcr.io/org/team/app:v1.2"),
            ("localhost/a", "localhost/a:latest"),
            ("127.0.0.1:5000/a:b", "127.0.0.1:5000/a:b"),
            ("[::1]:5000/a", "[::1]:5000/a:latest"),
        ] {
            assert_eq!(shown(text).unwrap(), meant);
        }
        let digest = Digest::of(b"");
        let pinned: Reference = format!("debian:12@{digest}").parse().unwrap();
        assert_eq!(pinned.selector(), digest.to_string());
        assert!(
            shown("[::1]:5000/a").is_ok_and(|_| "[::1]:5000/a".parse::<Reference>().unwrap().is_loopback())
        );
        assert!(!"ghcr.io/a".parse::<Reference>().unwrap().is_loopback());
    }

    #[test]
    fn refuses_what_would_be_another_url() {
        for bad in [
            "",
            ":",
            "a:",
            "A",
            "a//b",
            "/a",
            "a/",
            "a/../b",
            "a:b/c",
            "a?b",
            "a b",
            "a@sha256:00",
            "a:-b",
            "a.b/",
            "evil.com#/a",
            "u@evil.com/a",
            "a.b%2f/a",
            "-a",
            "a_",
            "a:b:c",
        ] {
            assert!(bad.parse::<Reference>().is_err(), "{bad}");
        }
    }
}
