//! Errors and their causes.

use std::error::Error;
use std::iter::successors;

/// An error, then its cause, then the cause of that, and so on.
pub fn causes<'a>(error: &'a (dyn Error + 'static)) -> impl Iterator<Item = &'a (dyn Error + 'static)> {
    successors(Some(error), |error: &&(dyn Error + 'static)| (*error).source())
}

/// The first error of a given type among an error and its causes.
pub fn find_cause<'a, E: Error + 'static>(error: &'a (dyn Error + 'static)) -> Option<&'a E> {
    causes(error).find_map(|cause| cause.downcast_ref())
}

/// An error with its causes on one line, without text that an outer message already contains.
pub fn with_causes(error: &(dyn Error + 'static)) -> String {
    let mut text = error.to_string();
    for cause in causes(error).skip(1).map(ToString::to_string) {
        if text.is_empty() {
            text = cause;
        } else if !text.contains(&cause) {
            text = format!("{text}: {cause}");
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fmt;
    use std::io;

    #[derive(Debug)]
    struct Outer(&'static str, io::Error);

    impl fmt::Display for Outer {
        fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str(self.0)
        }
    }

    impl Error for Outer {
        fn source(&self) -> Option<&(dyn Error + 'static)> {
            Some(&self.1)
        }
    }

    #[test]
    fn causes_are_printed_once_and_found_by_type() {
        let of = |message| Outer(message, io::Error::new(io::ErrorKind::TimedOut, "too slow"));
        assert_eq!(with_causes(&of("reading a.png")), "reading a.png: too slow");
        assert_eq!(with_causes(&of("reading a.png: too slow")), "reading a.png: too slow");
        assert_eq!(find_cause::<io::Error>(&of("")).map(io::Error::kind), Some(io::ErrorKind::TimedOut));
        assert!(find_cause::<fmt::Error>(&of("")).is_none());
        assert_eq!(causes(&of("")).count(), 2);
    }
}
