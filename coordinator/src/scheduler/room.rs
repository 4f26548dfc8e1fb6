//! How much fits into a block, so that no block exceeds the size of a message.

use elbo_core::ids::SampleId;
use elbo_core::sample::{Part, Sample};
use elbo_proto::{FULL_MESSAGE_BYTES, MAX_MESSAGE_BYTES};
use prost::encoding::encoded_len_varint;

/// Bytes that a sample may take in a block. A sample with more can't be sent to a worker because of its captions.
pub(super) const LARGEST_SAMPLE: usize = MAX_MESSAGE_BYTES / 2;

/// The most bytes of the tags, lengths and numbers of a sample, and of a unit.
const FRAME: usize = 96;

/// The most bytes of the tag and length of a text.
const TEXT_FRAME: usize = 6;

// The first sample always goes into a block, whatever it takes.
const _: () = assert!(LARGEST_SAMPLE + 2 * FULL_MESSAGE_BYTES <= MAX_MESSAGE_BYTES);

/// The most bytes that a sample takes in a block.
pub(super) fn of_sample(sample: &Sample) -> usize {
    let Sample { id: _, key, location, part, size: _, etag, label: _, candidates, pair } = sample;
    let column = match part {
        Some(Part::Cell { column, .. }) => column.len(),
        Some(Part::Member { .. }) | None => 0,
    };
    let names =
        key.len() + location.len() + column + [etag, pair].into_iter().flatten().map(String::len).sum::<usize>();
    FRAME + names + candidates.iter().map(|caption| caption.len() + TEXT_FRAME).sum::<usize>()
}

/// The most bytes that a unit takes in a block, with `prompts` of the sample's `all` prompts.
pub(super) fn of_unit(prompts: usize, all: usize) -> usize {
    FRAME + prompts * encoded_len_varint(all as u64)
}

/// The room left in a block.
#[derive(Clone, Copy, Debug)]
pub(super) struct Room {
    left: usize,
    last: Option<SampleId>,
}

impl Room {
    /// Room for this many bytes, not counting the first unit and its sample.
    pub(super) fn new(bytes: usize) -> Self {
        Self { left: bytes, last: None }
    }

    /// Whether a unit of this size fits, with its sample if that differs from the last unit's; if so, takes the room.
    pub(super) fn takes(&mut self, sample: SampleId, unit: usize, bytes_of_sample: impl FnOnce() -> usize) -> bool {
        let bytes = match self.last {
            None => 0,
            Some(last) if last == sample => unit,
            Some(_) => unit + bytes_of_sample(),
        };
        let fits = bytes <= self.left;
        if fits {
            self.left -= bytes;
            self.last = Some(sample);
        }
        fits
    }
}
