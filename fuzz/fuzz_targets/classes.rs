//! Any text as a class file: classes whose prompts name them, or an error.
#![no_main]

use elbo_common::class::Classes;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    if let Ok(classes) = Classes::parse(text, &[]) {
        assert!(!classes.prompts.is_empty());
        assert!(classes.prompts.iter().all(|prompt| classes.names.contains_key(&prompt.class)));
    }
});
