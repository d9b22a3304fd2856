//! What the fuzz targets share: the guest's decoders, ways to spell an input, and a count of the heap.
//!
//! A target is a file under `targets/`: it feeds one decoder and says what must hold whatever comes in. How it is run is told in
//! `scripts/fuzz`.
//!
//! The decoders are compiled in by path: they name little beside each other, and as dependencies the guest and the server would bring
//! all that they need themselves.

pub mod filler;
pub mod heap;
pub mod reads;
pub mod script;

#[path = "../../crates/guest/src/cap.rs"]
pub mod cap;
#[path = "../../crates/guest/src/capture.rs"]
pub mod capture;
#[path = "../../crates/guest/src/json.rs"]
pub mod json;
#[path = "../../crates/guest/src/message.rs"]
pub mod message;
#[path = "../../crates/guest/src/kernel/relay.rs"]
pub mod relay;
#[path = "../../crates/guest/src/zmtp.rs"]
pub mod zmtp;
