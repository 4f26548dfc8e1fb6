//! Tests of the ledger on a store in memory, and of the size of its entries.

use std::sync::Arc;

use elbo_core::failure::{FailureStage, SampleFailure};
use elbo_core::ids::{Round, SampleId};
use elbo_core::unit::UnitId;
use slatedb::object_store::memory::InMemory;

use super::*;
use crate::scheduler::UnitResult;

fn store() -> Store {
    Store::from_parts(Arc::new(InMemory::new()), Location::parse("memory:///").unwrap())
}

fn record(sample: u64) -> Record {
    let id = UnitId { sample: SampleId(sample), round: Round(1), slots: 2, prompts: 0 };
    let result = v1::UnitResult {
        id: Some(id.into()),
        prompts: vec![3, 5],
        slots: 2,
        sum: vec![0.5, 1.0],
        sum_sq: vec![0.25, 1.0],
        errors: vec![],
    };
    let failure = SampleFailure { sample: SampleId(sample + 1), stage: FailureStage::Decode, error: "cut off".into() };
    Record { results: vec![result.try_into().unwrap()], failures: vec![failure] }
}

#[tokio::test]
async fn records_survive_a_coordinator_that_never_closed_its_ledger() {
    let out = store();
    let first = Ledger::open(&out).await.unwrap();
    first.begin("f", BTreeMap::new()).await.unwrap();
    first.append(&record(1), 10, Waste::default()).await.unwrap();
    first.append(&record(5), 10, Waste::default()).await.unwrap();
    // Not closed: as after a kill.
    let second = Ledger::open(&out).await.unwrap();
    assert_eq!(second.epoch(), Epoch(2));
    assert_eq!(second.fingerprint().await.unwrap().as_deref(), Some("f"));
    second.append(&record(3), 10, Waste::default()).await.unwrap();
    assert_eq!(second.records(ShardId(0), None).await.unwrap(), [record(1), record(5), record(3)]);
    assert!(second.records(ShardId(1), None).await.unwrap().is_empty());
}

#[tokio::test]
async fn a_large_record_is_stored_in_entries_of_bounded_size_and_comes_back_whole() {
    let out = store();
    let ledger = Ledger::open(&out).await.unwrap();
    let result = |slots| {
        let id = UnitId { sample: SampleId(3), round: Round(0), slots, prompts: 0 };
        let reported = v1::UnitResult {
            id: Some(id.into()),
            prompts: (0..64).collect(),
            slots: 64,
            errors: vec![0.5; 4096],
            ..v1::UnitResult::default()
        };
        UnitResult { id, reported }
    };
    let failure = SampleFailure { sample: SampleId(4), stage: FailureStage::Read, error: "x".repeat(4096) };
    let large = Record { results: (0..400).map(result).collect(), failures: vec![failure; 500] };
    ledger.append(&large, 10, Waste::default()).await.unwrap();
    let mut entries = ledger.db.scan_prefix(result_prefix(ShardId(0)), ..).await.unwrap();
    let mut sizes = Vec::new();
    while let Some(entry) = entries.next().await.unwrap() {
        sizes.push(entry.value.len());
    }
    assert!(sizes.len() > 7 && sizes.iter().all(|size| *size <= RECORD_BYTES), "{sizes:?}");
    let mut whole = Record::default();
    for part in Ledger::open(&out).await.unwrap().records(ShardId(0), None).await.unwrap() {
        whole.results.extend(part.results);
        whole.failures.extend(part.failures);
    }
    assert_eq!(whole, large);
}

#[tokio::test]
async fn a_committed_shard_leaves_only_its_totals() {
    let out = store();
    let ledger = Ledger::open(&out).await.unwrap();
    ledger.append(&record(1), 10, Waste::default()).await.unwrap();
    ledger.append(&record(21), 10, Waste::default()).await.unwrap();
    let totals = ShardTotals { samples: 10, quarantined: 1, evaluations: 99, spared: 7 };
    let waste = Waste { recomputed: 0, duplicated: 12 };
    let mark = Mark { totals, files: vec![Checksum::of(&layout::predictions(ShardId(0)), b"rows")] };
    ledger.commit(ShardId(0), mark.clone(), waste).await.unwrap();
    assert_eq!(Ledger::open(&out).await.unwrap().waste(), waste);
    let ledger = Ledger::open(&out).await.unwrap();
    assert!(ledger.records(ShardId(0), None).await.unwrap().is_empty());
    assert_eq!(ledger.records(ShardId(2), None).await.unwrap().len(), 1);
    assert_eq!(ledger.done().await.unwrap(), BTreeMap::from([(ShardId(0), mark)]));
}

#[tokio::test]
async fn a_second_coordinator_fences_the_first() {
    let out = store();
    let first = Ledger::open(&out).await.unwrap();
    first.hold().await.unwrap();
    let second = Ledger::open(&out).await.unwrap();
    assert!(
        matches!(first.hold().await, Err(LedgerError::Fenced)),
        "a coordinator with nothing to write finds out too"
    );
    second.hold().await.unwrap();
    let error = first.append(&record(1), 10, Waste::default()).await.unwrap_err();
    assert!(matches!(error, LedgerError::Fenced), "{error}");
}

#[tokio::test]
async fn a_retry_voids_earlier_failures_and_lasts_until_the_shard_is_committed_again() {
    let out = store();
    let first = Ledger::open(&out).await.unwrap();
    first.append(&record(1), 10, Waste::default()).await.unwrap();
    let totals = ShardTotals { quarantined: 1, ..ShardTotals::default() };
    first.commit(ShardId(7), Mark { totals, files: vec![] }, Waste::default()).await.unwrap();
    let second = Ledger::open(&out).await.unwrap();
    assert_eq!(second.begun().await.unwrap(), [ShardId(0)].into());
    second.retry([ShardId(0), ShardId(7)]).await.unwrap();
    assert!(second.done().await.unwrap().is_empty());
    second.append(&record(5), 10, Waste::default()).await.unwrap();
    // Not closed: as after a kill.
    let third = Ledger::open(&out).await.unwrap();
    let retried = third.retried().await.unwrap();
    assert_eq!(retried, [(ShardId(0), Epoch(2)), (ShardId(7), Epoch(2))].into());
    let without_failures = Record { failures: Vec::new(), ..record(1) };
    let records = third.records(ShardId(0), retried.get(&ShardId(0)).copied()).await.unwrap();
    assert_eq!(records, [without_failures, record(5)]);
    third.commit(ShardId(0), Mark::default(), Waste::default()).await.unwrap();
    assert_eq!(third.retried().await.unwrap().into_keys().collect::<Vec<_>>(), [ShardId(7)]);
    assert!(third.begun().await.unwrap().is_empty());
}

#[tokio::test]
async fn quarantined_samples_of_open_shards_can_be_read_while_a_coordinator_works() {
    let out = store();
    assert!(given_up(&out).await.unwrap().is_empty());
    let ledger = Ledger::open(&out).await.unwrap();
    for sample in [1, 5, 21, 35] {
        ledger.append(&record(sample), 10, Waste::default()).await.unwrap();
    }
    ledger.commit(ShardId(2), Mark::default(), Waste::default()).await.unwrap();
    let found = |failures: Vec<SampleFailure>| failures.into_iter().map(|failure| failure.sample.0).collect::<Vec<_>>();
    assert_eq!(found(given_up(&out).await.unwrap()), [2, 6, 36]);
    ledger.append(&record(7), 10, Waste::default()).await.unwrap();
    ledger.hold().await.unwrap();
    // Failures from before a retry are void.
    let second = Ledger::open(&out).await.unwrap();
    second.retry([ShardId(0)]).await.unwrap();
    second.append(&record(3), 10, Waste::default()).await.unwrap();
    assert_eq!(found(given_up(&out).await.unwrap()), [4, 36]);
    second.hold().await.unwrap();
}

/// A race's ledger keeps single errors, since sums lose the pairs. Single errors are also smaller, as rounds are short.
#[test]
fn single_errors_of_a_race_take_less_than_sums() {
    use elbo_core::policy::{Course, Policy, Timesteps};
    use prost::Message;
    let contenders = elbo_core::ensemble::Contenders::prompts(1000);
    let policy = Policy::race(0.02, 250, Timesteps::default()).unwrap();
    let course = Course::new(&policy, None, 1000, Some(&contenders)).unwrap();
    let mut bytes = (0, 0);
    for (done, left) in [(0, 1000), (2, 400), (3, 100), (4, 10), (5, 4), (8, 2), (14, 2), (20, 2)] {
        let prompts: Vec<_> = (0..left).map(elbo_core::ids::PromptIndex).collect();
        let slots = course.round(Round(1), done, &contenders, &prompts).unwrap().len();
        let id = UnitId { sample: SampleId(1), round: Round(1), slots: 0, prompts: 0 };
        let of = |sums: usize, errors: usize| {
            let (sum, sum_sq, errors) = (vec![0.5; sums], vec![0.25; sums], vec![0.1; errors]);
            let prompts = prompts.iter().map(|p| p.0).collect();
            v1::UnitResult { id: Some(id.into()), prompts, slots: slots as u32, sum, sum_sq, errors }.encoded_len()
        };
        let (errors, sums) = (of(0, slots * left as usize), of(left as usize, 0));
        assert!(
            slots > 4 || errors <= sums,
            "{left} prompts on {slots} slots: {errors} bytes of errors, {sums} of sums"
        );
        bytes = (bytes.0 + errors, bytes.1 + sums);
    }
    assert!(bytes.0 < bytes.1, "{bytes:?}: errors, sums");
}

#[tokio::test]
async fn a_discarded_job_is_forgotten_and_its_coordinator_stays_fenced() {
    let out = store();
    let old = Ledger::open(&out).await.unwrap();
    old.begin("old", BTreeMap::new()).await.unwrap();
    old.append(&record(1), 10, Waste { recomputed: 3, duplicated: 4 }).await.unwrap();
    old.commit(ShardId(7), Mark::default(), Waste::default()).await.unwrap();
    let new = Ledger::open(&out).await.unwrap();
    new.discard(["in job.json".to_owned()]).await.unwrap();
    assert!(matches!(old.hold().await, Err(LedgerError::Fenced)));
    assert_eq!((new.fingerprint().await.unwrap(), new.waste()), (None, Waste::default()));
    assert!(new.done().await.unwrap().is_empty() && new.begun().await.unwrap().is_empty());
    new.begin("new", BTreeMap::new()).await.unwrap();
    let third = Ledger::open(&out).await.unwrap();
    assert_eq!(third.epoch(), Epoch(3), "a fence is permanent");
    assert_eq!(third.fingerprint().await.unwrap().as_deref(), Some("new"));
    assert_eq!(third.discarded().await.unwrap(), ["in job.json".to_owned(), "old".to_owned()].into());
}

#[tokio::test]
async fn both_hashes_of_a_file_are_valid_while_it_is_replaced() {
    let out = store();
    let ledger = Ledger::open(&out).await.unwrap();
    let path = layout::predictions(ShardId(0));
    let (before, after) = (Checksum::of(&path, b"before"), Checksum::of(&path, b"after"));
    let audit = Checksum::of(&layout::audit(ShardId(0)), b"audit");
    let mark = Mark { totals: ShardTotals::default(), files: vec![audit.clone(), before.clone()] };
    ledger.commit(ShardId(0), mark, Waste::default()).await.unwrap();
    ledger.expect(ShardId(0), after.clone()).await.unwrap();
    // This is what a check of the output sees meanwhile.
    assert_eq!(marks(&out).await.unwrap().unwrap()[&ShardId(0)], [audit.clone(), before, after.clone()]);
    ledger.settle(vec![(ShardId(0), after.clone())]).await.unwrap();
    assert_eq!(marks(&out).await.unwrap().unwrap()[&ShardId(0)], [audit, after]);
    assert_eq!(marks(&store()).await.unwrap(), None, "there is no ledger");
    ledger.hold().await.unwrap();
}
