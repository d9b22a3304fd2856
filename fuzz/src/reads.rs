//! Where a stream of bytes is cut into reads: the fuzzer chooses, and nothing may depend on it.

/// Sizes of reads, repeated for as long as there are bytes.
#[derive(Debug, Clone, Copy)]
pub struct Reads([u8; 4]);

impl Reads {
    /// All in one.
    pub const WHOLE: Self = Self([u8::MAX; 4]);

    /// Takes the sizes off the input's beginning.
    #[must_use]
    pub fn split_off(input: &[u8]) -> Option<(Self, &[u8])> {
        input.split_first_chunk().map(|(sizes, rest)| (Self(*sizes), rest))
    }

    /// The sizes as numbers, for a target that has other choices to make.
    #[must_use]
    pub fn choice(self, at: usize) -> usize {
        usize::from(self.0[at % 4])
    }

    /// Cuts `bytes`. Sizes go from 1 to 16 KiB, the small ones more often; after many reads they grow, for the sake of speed.
    pub fn of(self, mut bytes: &[u8]) -> impl Iterator<Item = &[u8]> {
        let mut at = 0;
        std::iter::from_fn(move || {
            let size = (1 + self.choice(at).pow(2) / 4) << (at / 512).min(16);
            at += 1;
            let size = if self.0 == Self::WHOLE.0 { bytes.len() } else { size };
            let (read, rest) = bytes.split_at(size.min(bytes.len()));
            bytes = rest;
            (!read.is_empty()).then_some(read)
        })
    }
}
