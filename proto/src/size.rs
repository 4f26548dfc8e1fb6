//! How large messages may be. Content without a bound of its own (blocks, reports, the job's description) is sent in parts, so
//! no message comes near the limit.

use std::fmt;

use prost::Message;

/// Largest message either side accepts, in bytes.
pub const MAX_MESSAGE_BYTES: usize = 32 << 20;

/// Bytes at which a message is full: more content goes into the next one.
pub const FULL_MESSAGE_BYTES: usize = 4 << 20;

/// Longest error text that is sent and kept, in bytes.
pub const ERROR_BYTES: usize = 4096;

/// A message larger than either side accepts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TooLarge {
    what: &'static str,
    bytes: usize,
}

impl fmt::Display for TooLarge {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { what, bytes } = self;
        write!(
            f,
            "{what} takes {bytes} bytes, more than the message limit of {MAX_MESSAGE_BYTES}: run the same version of elbo on coordinator and workers; if you already do, report this"
        )
    }
}

impl std::error::Error for TooLarge {}

/// Refuses a message that the other side would not accept; `what` names it.
pub fn check_size(what: &'static str, message: &impl Message) -> Result<(), TooLarge> {
    let bytes = message.encoded_len();
    if bytes > MAX_MESSAGE_BYTES { Err(TooLarge { what, bytes }) } else { Ok(()) }
}

/// The most bytes an item takes in a message that lists it.
pub fn bytes_of(item: &impl Message) -> usize {
    // Its tag, and its length in a varint.
    item.encoded_len() + 6
}

/// An error text, cut if it is too long.
pub fn shortened(mut text: String) -> String {
    if text.len() > ERROR_BYTES {
        text.truncate(text.floor_char_boundary(ERROR_BYTES));
        text.push('…');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::v1;

    #[test]
    fn an_oversized_message_is_refused_with_its_name_and_size() {
        let report = |bytes| v1::ReportRequest { worker: "x".repeat(bytes), ..v1::ReportRequest::default() };
        assert_eq!(check_size("a report", &report(1 << 20)), Ok(()));
        let error = check_size("a report", &report(MAX_MESSAGE_BYTES)).unwrap_err().to_string();
        assert!(error.starts_with("a report takes 33554437 bytes") && error.contains("33554432:"), "{error}");
    }

    #[test]
    fn a_list_takes_no_more_bytes_than_its_items() {
        let result = |prompts| v1::UnitResult { prompts: vec![300; prompts], ..v1::UnitResult::default() };
        for prompts in [0, 1, 64, 100_000] {
            let report = v1::ReportRequest { results: vec![result(prompts); 10], ..v1::ReportRequest::default() };
            assert!(report.encoded_len() <= 10 * bytes_of(&result(prompts)));
        }
    }

    #[test]
    fn a_long_error_text_is_cut_between_characters() {
        assert_eq!(shortened("short".into()), "short");
        assert!(shortened("ä".repeat(ERROR_BYTES)).len() <= ERROR_BYTES + '…'.len_utf8());
    }
}
