//! Makes long what would be too long for an input: three bytes that JSON forbids stand for runs of text.

/// Lengths of a run, around the limits of the decoders.
const SIZES: [usize; 16] = [0, 1, 8, 16, 33, 100, 256, 257, 500, 1000, 2000, 4096, 4100, 16_385, 66_000, 270_000];
/// Most bytes that all runs of an input have together.
const MOST: usize = 320 * 1024;

/// What is left of an input's share of filler.
pub struct Filler {
    left: usize,
}

impl Default for Filler {
    fn default() -> Self {
        Self { left: MOST }
    }
}

impl Filler {
    /// The length that a choice of the fuzzer stands for, as far as the share goes.
    pub fn size(&mut self, choice: u8) -> usize {
        let size = SIZES[usize::from(choice % 16)].min(self.left);
        self.left -= size;
        size
    }

    /// The bytes with `0x1a` as a run of `a`, `0x1b` as one of `é`, and `0x1c` as one of escaped line ends.
    pub fn fill(&mut self, bytes: &[u8], choice: u8) -> Vec<u8> {
        let mut filled = Vec::with_capacity(bytes.len());
        for byte in bytes {
            // Escapes take their time, one by one.
            let (unit, share): (&[u8], usize) = match byte {
                0x1a => (b"a", 1),
                0x1b => ("é".as_bytes(), 2),
                0x1c => (b"\\n", 16),
                _ => {
                    filled.push(*byte);
                    continue;
                }
            };
            filled.extend(unit.repeat(self.size(choice) / share));
        }
        filled
    }
}
