//! Checks a job from the logs of its coordinators: which units were granted and acknowledged, counted independently of them.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use serde_json::Value;

/// How much was granted and acknowledged.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Account {
    /// Coordinators that granted or acknowledged units.
    pub coordinators: usize,
    /// Grants of units to workers; a unit granted twice counts twice.
    pub granted: usize,
    /// Units whose results were acknowledged to a worker.
    pub acknowledged: usize,
}

/// Reads the JSON logs in a directory, from coordinators that logged `elbo::audit` at debug level. Checks that no unit was
/// granted after its result had been acknowledged, by the same coordinator or by an earlier one. A replaced coordinator
/// acknowledges nothing.
pub fn check(logs: &Path) -> Account {
    let mut by_epoch: BTreeMap<u64, Vec<(bool, String)>> = BTreeMap::new();
    for log in crate::sorted(logs) {
        let text = std::fs::read_to_string(&log).expect("a log");
        // The last line of a killed coordinator may be cut off.
        for line in text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok()) {
            let fields = &line["fields"];
            let granted = match (line["target"].as_str(), fields["message"].as_str()) {
                (Some("elbo::audit"), Some("granted")) => true,
                (Some("elbo::audit"), Some("acknowledged")) => false,
                _ => continue,
            };
            let spans = line["spans"].as_array().expect("the spans of an event");
            let epoch = spans.iter().find_map(|span| span["epoch"].as_u64()).expect("the coordinator's epoch");
            let units = fields["units"].as_str().expect("the units").to_owned();
            by_epoch.entry(epoch).or_default().push((granted, units));
        }
    }
    let mut account = Account { coordinators: by_epoch.len(), ..Account::default() };
    let mut safe = BTreeSet::new();
    for (epoch, events) in by_epoch {
        for (granted, units) in events {
            for unit in units.split_whitespace() {
                if granted {
                    assert!(!safe.contains(unit), "unit {unit} was acknowledged but is granted again in epoch {epoch}");
                    account.granted += 1;
                } else {
                    safe.insert(unit.to_owned());
                }
            }
        }
    }
    account.acknowledged = safe.len();
    account
}
