//! What can be made to go wrong.

use std::time::Duration;

/// Where something goes wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum At {
    /// As it starts.
    Start,
    /// As it is adopted.
    Adopt,
    /// At any request but a stop.
    Request,
    /// When the guest is asked to end.
    Stop,
    /// As what is left of it is removed. Only [`How::Fail`].
    Remove,
    /// At a try to connect to the agent.
    Agent,
}

/// How it goes wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum How {
    /// It is refused, with this message. A guest asked to end ignores it.
    Fail(String),
    /// Nothing happens, until whoever waits gives up. A guest asked to end ignores it.
    Hang,
    /// It succeeds, and so much later the VMM is killed.
    DieAfter(Duration),
}

/// Something that is to go wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    pub at: At,
    pub how: How,
    /// For this microVM; None is any.
    pub id: Option<String>,
    /// How often. 0 is once, too.
    pub times: usize,
}

impl Fault {
    /// Once, for any microVM.
    pub fn once(at: At, how: How) -> Self {
        Fault { at, how, id: None, times: 1 }
    }

    /// Each time, for one microVM.
    pub fn always(at: At, how: How, id: &str) -> Self {
        Fault { at, how, id: Some(id.to_owned()), times: usize::MAX }
    }

    pub(super) fn fits(&self, at: At, id: &str) -> bool {
        self.at == at && self.id.as_deref().is_none_or(|own| own == id)
    }
}
