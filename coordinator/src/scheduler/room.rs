//! How much goes into a block, so that none is larger than a message may be.

use elbo_core::ids::SampleId;
use elbo_core::sample::{Part, Sample};
use elbo_proto::{FULL_MESSAGE_BYTES, MAX_MESSAGE_BYTES};
use prost::encoding::encoded_len_varint;

/// Bytes that a sample may take in a block; one with more has captions no worker can be sent.
pub(super) const LARGEST_SAMPLE: usize = MAX_MESSAGE_BYTES / 2;

/// Bytes of the tags, lengths and numbers of a sample, and of a unit, at most.
const FRAME: usize = 96;

/// Bytes of the tag and the length of a text, at most.
const TEXT_FRAME: usize = 6;

// The first sample goes into a block whatever it takes.
const _: () = assert!(LARGEST_SAMPLE + 2 * FULL_MESSAGE_BYTES <= MAX_MESSAGE_BYTES);

/// Bytes that a sample takes in a block, at most.
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

/// Bytes that a unit with so many of its sample's `all` prompts takes in a block, at most.
pub(super) fn of_unit(prompts: usize, all: usize) -> usize {
    FRAME + prompts * encoded_len_varint(all as u64)
}

/// What a block still has room for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Room {
    left: usize,
    last: Option<SampleId>,
}

impl Room {
    /// Room for so many bytes beside the first unit and its sample.
    pub(super) fn new(bytes: usize) -> Self {
        Self { left: bytes, last: None }
    }

    /// Whether a unit of so many bytes goes in too, with its sample where it is another than the last one's.
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
