//! Whole-system tests of Pulau.
