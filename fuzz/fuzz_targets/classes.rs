//! Parses any text as a class file and as a hierarchy of its classes. The result is an error, or classes and groups in which
//! every prompt belongs to a known class.
#![no_main]

use elbo_core::class::{Classes, Hierarchy};
use elbo_core::ensemble::Contenders;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    if let Ok(classes) = Classes::parse(text, &[]) {
        assert!(!classes.prompts.is_empty());
        assert!(classes.prompts.iter().all(|prompt| classes.names.contains_key(&prompt.class)));
        if let Ok(hierarchy) = Hierarchy::parse(text, &classes, &[]) {
            let contenders = Contenders::prompts(classes.prompts.len()).below(&hierarchy, &classes);
            let mut level = contenders.first();
            while contenders.have_groups(&level) {
                level = contenders.opened(&level);
            }
            assert!(level.into_iter().eq(contenders.of_all_classes()), "every class is in some group or in none");
        }
    }
});
