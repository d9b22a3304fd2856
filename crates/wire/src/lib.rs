//! What the control plane and the guest agree on: the reset marker, the frame, and the bodies of the link's requests.
//!
//! Nothing here opens or waits for anything of its own, and nothing here trusts the other side: every decoder has a bound.

pub mod commands;
pub mod egress;
pub mod files;
pub mod frame;
pub mod link;
pub mod marker;
pub mod ports;
pub mod trial;
pub mod tunnel;

/// Generation of the protocol. Both sides say theirs, and the lower one is used; new fields are optional.
pub const GENERATION: u32 = 1;
