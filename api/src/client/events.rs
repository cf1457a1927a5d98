//! A stream of server-sent events, as the daemon sends them.

use anyhow::bail;
use http_body_util::BodyExt as _;
use hyper::body::Incoming;
use hyper::{Method, Response};
use serde_json::Value;

use super::Client;

/// No event is longer.
const LONGEST: usize = 64 << 10;

/// Events as they come.
pub struct Subscription {
    body: Incoming,
    buffer: Vec<u8>,
}

/// What came.
#[derive(Debug, PartialEq)]
pub enum Received {
    /// A change of state, and the event's id.
    State { id: String, event: Value },
    /// Some are missing before the next.
    Lost,
}

impl Subscription {
    /// Asks for events behind one, or for new ones.
    ///
    /// # Errors
    ///
    /// The daemon is not reached, or refuses.
    pub async fn open(client: &Client, after: Option<&str>) -> anyhow::Result<Self> {
        let mut request = client.builder(Method::GET, "/v1/events");
        if let Some(after) = after {
            request = request.header("last-event-id", after);
        }
        let response: Response<Incoming> = client.transmit(request.body(Default::default())?).await?;
        let response = super::successful(response).await?;
        Ok(Subscription { body: response.into_body(), buffer: Vec::new() })
    }

    /// The next event; None if the daemon ends. May be cancelled without a loss.
    ///
    /// # Errors
    ///
    /// The daemon broke off, or what it sends is none.
    pub async fn next(&mut self) -> anyhow::Result<Option<Received>> {
        loop {
            while let Some(end) = self.buffer.windows(2).position(|pair| pair == b"\n\n") {
                let text: Vec<u8> = self.buffer.drain(..end + 2).collect();
                if let Some(received) = parse(&String::from_utf8_lossy(&text))? {
                    return Ok(Some(received));
                }
            }
            if self.buffer.len() > LONGEST {
                bail!("the daemon sends an event without end");
            }
            match self.body.frame().await {
                None => return Ok(None),
                Some(Err(error)) => bail!("the daemon broke off: {error}"),
                Some(Ok(frame)) => self.buffer.extend(frame.data_ref().into_iter().flatten()),
            }
        }
    }
}

/// One event; None if it is a comment, or of a kind that is not known.
fn parse(text: &str) -> anyhow::Result<Option<Received>> {
    let field = |name: &str| {
        let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        value.map(|value| value.strip_prefix(' ').unwrap_or(value))
    };
    Ok(match field("event") {
        Some("lost") => Some(Received::Lost),
        Some("state" | "status") => Some(Received::State {
            id: field("id").unwrap_or_default().to_owned(),
            event: serde_json::from_str(field("data").unwrap_or_default())?,
        }),
        _ => None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_are_told_from_comments() {
        let event = parse("event: state\nid: 5-0\ndata: {\"id\":\"i-1\"}\n\n").unwrap();
        assert_eq!(
            event,
            Some(Received::State { id: "5-0".into(), event: serde_json::json!({"id": "i-1"}) })
        );
        assert_eq!(parse(":\n\n").unwrap(), None);
        assert_eq!(parse("event:lost\ndata:x\n\n").unwrap(), Some(Received::Lost));
        assert_eq!(parse("event: other\ndata: {}\n\n").unwrap(), None);
        assert!(parse("event: state\ndata: {\n\n").is_err());
    }
}
