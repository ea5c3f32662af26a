//! What the guests and the test harness say to each other: the control file of a guest ([`control`]) and the requests that the first
//! process of a test host takes ([`wire`]).

pub mod control;
pub mod wire;
