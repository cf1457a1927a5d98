//! What a registry asks for in `WWW-Authenticate` (RFC 9110, section 11.6.1).

/// One challenge, such as `Bearer realm="https://…",service="…"`.
#[derive(Debug, PartialEq, Eq)]
pub struct Challenge {
    pub scheme: Scheme,
    parameters: Vec<(String, String)>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scheme {
    Bearer,
    Basic,
}

impl Challenge {
    /// Reads a header with a single challenge in it. None if it is malformed, or of a scheme we have no use for.
    pub fn parse(header: &str) -> Option<Self> {
        let (scheme, mut rest) = header.trim().split_once(' ').unwrap_or((header.trim(), ""));
        let scheme = match scheme.to_ascii_lowercase().as_str() {
            "bearer" => Scheme::Bearer,
            "basic" => Scheme::Basic,
            _ => return None,
        };
        let mut parameters = Vec::new();
        loop {
            rest = rest.trim_start_matches([' ', ',', '\t']);
            if rest.is_empty() {
                return Some(Challenge { scheme, parameters });
            }
            let (name, after) = rest.split_once('=')?;
            let value;
            (value, rest) = match after.trim_start().strip_prefix('"') {
                Some(quoted) => unquote(quoted)?,
                None => {
                    let end = after.find(',').unwrap_or(after.len());
                    (after[..end].trim().to_owned(), &after[end..])
                }
            };
            parameters.push((name.trim().to_ascii_lowercase(), value));
        }
    }

    pub fn get(&self, name: &str) -> Option<&str> {
        self.parameters.iter().find(|(found, _)| found == name).map(|(_, value)| value.as_str())
    }
}

/// The text up to the closing quote, and what comes after it.
fn unquote(text: &str) -> Option<(String, &str)> {
    let mut value = String::new();
    let mut characters = text.char_indices();
    while let Some((at, character)) = characters.next() {
        match character {
            '"' => return Some((value, &text[at + 1..])),
            '\\' => value.push(characters.next()?.1),
            other => value.push(other),
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_registries_send() {
        let header =
            r#"Bearer realm="https://auth.example/token?a=b",service="r\"x", scope="repository:a:pull,push""#;
        let challenge = Challenge::parse(header).unwrap();
        assert_eq!(challenge.scheme, Scheme::Bearer);
        assert_eq!(challenge.get("realm"), Some("https://auth.example/token?a=b"));
        assert_eq!(challenge.get("service"), Some("r\"x"));
        assert_eq!(challenge.get("scope"), Some("repository:a:pull,push"));
        let basic = Challenge::parse("basic realm=x").unwrap();
        assert_eq!((basic.scheme, basic.get("realm")), (Scheme::Basic, Some("x")));
        for bad in ["", "Digest realm=x", "Bearer realm", "Bearer realm=\"x", "Bearer realm=\"x\\"] {
            assert_eq!(Challenge::parse(bad), None, "{bad}");
        }
    }
}
