//! Messages between the Pulau host and its guest agent.
