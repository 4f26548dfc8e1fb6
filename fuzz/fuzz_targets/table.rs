//! Lists and reads any bytes as table.parquet.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| elbo_fuzz::list_and_read("table.parquet", bytes));
