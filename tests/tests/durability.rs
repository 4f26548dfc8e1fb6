//! Power cuts, full and failing disks, bit rot, late writes: no acknowledged result is lost, and damaged files are found and
//! recomputed to the same bytes.

#![allow(clippy::unwrap_used, reason = "a test that can't be set up must fail")]

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::LazyLock;
use std::time::{Duration, Instant};

use elbo_coordinator::ledger::marks;
use elbo_data::manifest::Manifest;
use elbo_output::record::JobRecord;
use elbo_output::verify::{Expected, Verification, verify};
use elbo_store::{Location, Store};
use elbo_tests::disk::Disk;
use elbo_tests::patience::{seconds, wait_until};
use elbo_tests::proxy::Proxy;
use elbo_tests::servers::Moto;
use elbo_tests::{
    Process, coordinator_flags, copy_tree, elbo, free_address, job_flags, json, lease_log, model, results, run, run_ok,
    some_images, sorted, stderr, with,
};
use tempfile::TempDir;

/// 50 images in five shards.
static IMAGES: LazyLock<TempDir> = LazyLock::new(|| some_images(5));

fn flags(out: &Path) -> Vec<String> {
    with(job_flags(IMAGES.path(), out), &[("--shard-size", "10")])
}

fn label(out: &Path) -> Command {
    let mut command = elbo();
    command.arg("label").args(flags(out)).arg("--write-errors").args(["--audit", "20%", "--policy", "race"]);
    let at = command.get_args().position(|flag| flag == "--keep").unwrap();
    without(&command, at)
}

/// The command without `--keep` and `--samples`, the reference's schedule, which a race does not have.
fn without(command: &Command, at: usize) -> Command {
    let mut shorter = elbo();
    let kept = command.get_args().enumerate().filter(|(position, _)| !(at..at + 4).contains(position));
    shorter.args(kept.map(|(_, flag)| flag));
    shorter
}

/// The output of an undisturbed run.
static CALM: LazyLock<TempDir> = LazyLock::new(|| {
    let outs = TempDir::new().unwrap();
    run_ok(&mut label(&outs.path().join("out")));
    outs
});

fn calm() -> PathBuf {
    CALM.path().join("out")
}

/// Starts a command in the background that logs its grants and acknowledgements as JSON.
fn start_logged(mut command: Command, log: &Path) -> Process {
    command.env("ELBO_LOG", "elbo::audit=debug,info").env("ELBO_LOG_FORMAT", "json");
    let log = std::fs::File::create(log).unwrap();
    Process(command.stdout(Stdio::null()).stderr(log).spawn().unwrap())
}

fn disk(megabytes: u64) -> Option<Disk> {
    match Disk::new(megabytes) {
        Ok(disk) => Some(disk),
        Err(reason) => {
            eprintln!("skipped: a separate disk can't be created ({reason})");
            None
        }
    }
}

fn committed(out: &Path) -> usize {
    let directory = out.join("predictions");
    if directory.is_dir() {
        sorted(&directory).iter().filter(|f| f.extension().is_some_and(|e| e == "parquet")).count()
    } else {
        0
    }
}

#[test]
fn a_job_resumes_to_the_same_bytes_after_a_power_cut_at_any_moment() {
    let Some(disk) = disk(64) else { return };
    let (out, logs) = (disk.path().join("deep/out"), TempDir::new().unwrap());
    let log = logs.path().join("log");
    let mut process = start_logged(label(&out), &log);
    let mut cuts = Vec::new();
    // Shortly after the start, between commits with enough shards left, and possibly while confidence is written.
    for shards in [0, 1, 2, 5] {
        wait_until(|| "the job makes no progress", || out.join("job.json").exists() && committed(&out) >= shards);
        std::thread::sleep(Duration::from_millis(50));
        if process.is_running() {
            process.signal("STOP");
            let said = std::fs::read(&log).unwrap();
            cuts.push((shards, disk.after_power_cut(), said));
            process.signal("CONT");
        }
    }
    assert_eq!(process.wait(), Some(0));
    assert!(cuts.len() >= 3, "the job ended before the power was cut");
    let finished = disk.after_power_cut();
    assert!(results(&finished.path().join("deep/out")) == results(&calm()), "finished results are not on the disk");
    let mut acknowledged = 0;
    for (shards, disk, said) in cuts {
        let (out, logs) = (disk.path().join("deep/out"), TempDir::new().unwrap());
        for file in results(&out) {
            assert!(!file.1.is_empty(), "{} is empty after the power cut", file.0);
        }
        assert!(committed(&out) >= shards, "of {shards} commits only {} are left", committed(&out));
        std::fs::write(logs.path().join("before"), said).unwrap();
        let before = lease_log::check(logs.path());
        let mut resumed = start_logged(label(&out), &logs.path().join("resumed"));
        assert_eq!(resumed.wait(), Some(0), "after {shards} commits");
        // No unit acknowledged before the power cut is granted again.
        lease_log::check(logs.path());
        acknowledged += before.acknowledged;
        let (found, expected) = (results(&out), results(&calm()));
        let others = found.iter().zip(&expected).filter(|(found, expected)| found != expected);
        let others: Vec<_> = others.map(|(found, expected)| (&found.0, &expected.0)).collect();
        assert!(found == expected, "after {shards} commits the bytes differ: {others:?}");
        assert_eq!(json(elbo().args(["report", "--json"]).arg(&out))["evaluations_recomputed"], 0);
    }
    assert!(acknowledged > 0, "no unit had been acknowledged");
}

#[test]
fn a_full_or_read_only_disk_ends_the_job_at_once_and_it_resumes_once_that_is_fixed() {
    let Some(disk) = disk(24) else { return };
    let out = disk.path().join("out");
    let stopped = |break_it: &dyn Fn(&Process), says: &str| {
        let mut command = label(&out);
        let child = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        let mut process = Process(child);
        wait_until(|| "it never begins", || out.join("job.json").exists());
        std::thread::sleep(Duration::from_millis(500));
        assert!(process.is_running());
        let began = Instant::now();
        break_it(&process);
        let code = process.wait();
        let mut said = String::new();
        std::io::Read::read_to_string(process.0.stderr.as_mut().unwrap(), &mut said).unwrap();
        assert_eq!(code, Some(3), "{said}");
        assert!(said.contains(says) && said.contains("run the same command again"), "{said}");
        eprintln!("it took {:.1} s to say {says:?}", began.elapsed().as_secs_f64());
        assert!(began.elapsed() < seconds(60), "it took {:?}", began.elapsed());
    };
    stopped(&|_| drop(disk.fill()), "is full: free some space");
    let again = run(&mut label(&out));
    assert_eq!(again.status.code(), Some(3), "{}", stderr(&again));
    assert!(stderr(&again).contains("is full: free some space"), "{}", stderr(&again));
    std::fs::remove_file(disk.path().join("filler")).unwrap();
    let freeze = |process: &Process| {
        wait_until(
            || "it is always writing",
            || {
                process.signal("STOP");
                let is_read_only = disk.remount("ro");
                process.signal("CONT");
                is_read_only
            },
        );
    };
    stopped(&freeze, "is read-only: mount it for writing");
    assert!(disk.remount("rw"));
    run_ok(&mut label(&out));
    assert!(results(&out) == results(&calm()));
    assert_eq!(json(elbo().args(["report", "--json"]).arg(&out))["evaluations_recomputed"], 0);
}

fn verified(out: &Path, with_ledger: bool) -> Verification {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let store = Store::open(&Location::Local(out.to_owned())).unwrap();
        let record = JobRecord::read(&store).await.unwrap().unwrap();
        let manifest = Manifest::open(&store, &record.manifest, record.identity.spec.shard_size).await.unwrap();
        let marks = if with_ledger { marks(&store).await.unwrap() } else { None };
        verify(&store, &manifest, &Expected::of(&record, marks)).await.unwrap()
    })
}

#[test]
fn every_flipped_bit_is_found_and_the_same_command_repairs_it() {
    let outs = TempDir::new().unwrap();
    let out = outs.path().join("out");
    copy_tree(&calm(), &out);
    assert!(verified(&out, true).ok && verified(&out, false).ok);
    let (mut flips, mut found_without_ledger) = (0, 0);
    for directory in ["predictions", "errors", "audit"] {
        let file = sorted(&out.join(directory)).remove(1);
        let sound = std::fs::read(&file).unwrap();
        for at in (0..sound.len()).step_by(sound.len() / 40) {
            let mut damaged = sound.clone();
            damaged[at] ^= 1 << (at % 8);
            std::fs::write(&file, &damaged).unwrap();
            let found = verified(&out, true);
            assert!(!found.ok, "{} with a flipped bit in byte {at} of {}", file.display(), sound.len());
            assert!(found.shards.iter().map(|shard| shard.0).eq([1]), "{:?}", found.problems);
            flips += 1;
            found_without_ledger += u32::from(!verified(&out, false).ok);
        }
        std::fs::write(&file, &sound).unwrap();
    }
    // Flips in the footers, a small part of a real file, can't be found without the ledger.
    eprintln!("{flips} flips; {found_without_ledger} were found without the ledger");
    assert!(flips > 100 && found_without_ledger > flips / 3, "{found_without_ledger} of {flips}");

    // One file is damaged, one is missing, one belongs to another job.
    let file = |shard: u32| out.join(format!("predictions/shard-{shard:05}.parquet"));
    let mut damaged = std::fs::read(file(1)).unwrap();
    damaged[100] ^= 4;
    std::fs::write(file(1), damaged).unwrap();
    std::fs::remove_file(file(2)).unwrap();
    let other = outs.path().join("other");
    run_ok(label(&other).args(["--seed", "5"]));
    std::fs::copy(other.join("predictions/shard-00003.parquet"), file(3)).unwrap();
    let told = run(elbo().arg("verify").arg(&out));
    let said = String::from_utf8_lossy(&told.stdout).into_owned();
    assert_eq!(told.status.code(), Some(1));
    assert!(said.contains("--recompute 1,3") && said.contains("belongs to another job"), "{said}");
    let mended = run_ok(&mut label(&out));
    assert!(stderr(&mended).contains("missing or damaged"), "{}", stderr(&mended));
    assert!(results(&out) == results(&calm()), "repaired to different bytes");
    assert_eq!(json(elbo().args(["verify", "--json"]).arg(&out))["ok"], true);

    // Named files are recomputed even if they are intact.
    let again = run_ok(label(&out).args(["--recompute", "predictions/shard-00004.parquet,0"]));
    assert!(!String::from_utf8_lossy(&again.stdout).contains("nothing was computed"));
    assert!(results(&out) == results(&calm()));
    let wrong = run(label(&out).args(["--recompute", "9"]));
    assert_eq!(wrong.status.code(), Some(2), "{}", stderr(&wrong));
}

#[test]
fn a_lost_or_damaged_ledger_costs_only_uncommitted_work() {
    let outs = TempDir::new().unwrap();
    let out = outs.path().join("out");
    copy_tree(&calm(), &out);
    // Damaged: the message says where and what to do.
    for file in sorted(&out.join("ledger/wal")).into_iter().chain(sorted(&out.join("ledger/manifest"))) {
        let mut bytes = std::fs::read(&file).unwrap();
        let middle = bytes.len() / 2;
        bytes[middle..].iter_mut().for_each(|byte| *byte = !*byte);
        std::fs::write(&file, bytes).unwrap();
    }
    let told = run(&mut label(&out));
    assert_eq!(told.status.code(), Some(1), "{}", stderr(&told));
    assert!(stderr(&told).contains("ledger") && stderr(&told).contains("delete"), "{}", stderr(&told));
    // Deleted, as the message advises: intact shards are kept and the rest is computed.
    std::fs::remove_dir_all(out.join("ledger")).unwrap();
    let kept = run_ok(&mut label(&out));
    assert!(String::from_utf8_lossy(&kept.stdout).contains("nothing was computed"));
    assert!(results(&out) == results(&calm()));
    std::fs::remove_dir_all(out.join("ledger")).unwrap();
    std::fs::write(out.join("errors/shard-00001.parquet"), "cut off").unwrap();
    let mended = run_ok(&mut label(&out));
    assert!(stderr(&mended).contains("4 of 5 shards are kept"), "{}", stderr(&mended));
    assert!(results(&out) == results(&calm()));
}

/// Starts a coordinator and a worker for it.
fn cluster(out: &Path, more: &[&str], log: &Path) -> (Process, Process) {
    let address = free_address();
    let mut command = elbo();
    command.arg("coordinator").args(with(coordinator_flags(IMAGES.path(), out), &[("--shard-size", "10")]));
    let coordinator = start_logged(with_args(command, more, &address), log);
    let mut command = elbo();
    command.args(["worker", "--threads", "1", "--batch", "16", "--patience", "5", "--coordinator"]);
    let worker = Process::start(command.arg(format!("http://{address}")));
    (coordinator, worker)
}

fn with_args(mut command: Command, more: &[&str], address: &str) -> Command {
    command.args(more).args(["--listen", address]);
    command
}

#[test]
fn starting_over_beside_a_running_coordinator_leaves_one_job() {
    let outs = TempDir::new().unwrap();
    let (out, calm) = (outs.path().join("out"), outs.path().join("calm"));
    let other = |out: &Path| {
        let mut command = elbo();
        command.arg("label").args(flags(out)).args(["--seed", "7"]);
        command
    };
    run_ok(&mut other(&calm));
    let log = outs.path().join("log");
    let (mut coordinator, mut worker) = cluster(&out, &[], &log);
    wait_until(|| "no shard is committed", || committed(&out) > 0);
    assert!(coordinator.is_running(), "the job ended too early");
    run_ok(other(&out).arg("--fresh"));
    assert_eq!(coordinator.wait(), Some(1), "the coordinator must notice that it was replaced");
    assert!(std::fs::read_to_string(&log).unwrap().contains("another coordinator has taken over"));
    worker.end();
    assert!(results(&out) == results(&calm), "the jobs are mixed");
    assert!(verified(&out, true).ok, "{:?}", verified(&out, true).problems);
}

/// A put delayed on the network arrives after its coordinator has been replaced and the job is done.
#[test]
fn a_write_that_arrives_late_changes_nothing() {
    let moto = Moto::start();
    let bucket = moto.bucket();
    bucket.upload(IMAGES.path(), "images");
    bucket.upload(&model(), "model");
    let cache = TempDir::new().unwrap();
    let url = |name: &str| format!("{}/{name}", bucket.url);
    let flags = |out: &str| {
        let flags = job_flags(Path::new(&url("images")), Path::new(&url(out)));
        with(flags, &[("--model", &url("model")), ("--shard-size", "10")])
    };
    let command = |endpoint: &str, out: &str| {
        let mut command = moto.bucket_through(endpoint).on(elbo());
        command.env("ELBO_CACHE", cache.path()).arg("label").args(flags(out));
        command
    };
    run_ok(&mut command(&moto.endpoint, "calm"));
    // The first commit of a shard, which requires that no file exists, and the later write of its confidence, which requires
    // that the file is unchanged.
    for (n, condition) in ["if-none-match:", "if-match:"].into_iter().enumerate() {
        let out = format!("late-{n}");
        let proxy = Proxy::start(&moto.endpoint, 0, 0);
        proxy.hold("predictions/shard-00001.parquet", condition);
        let mut first = Process::start(&mut command(&proxy.endpoint, &out));
        wait_until(|| "no put was delayed", || proxy.is_holding());
        assert!(first.is_running());
        first.kill();
        run_ok(&mut command(&moto.endpoint, &out));
        let answer = proxy.release();
        assert!(answer.contains(" 412 "), "the late put was answered {answer:?}");
        assert!(bucket.results(&out) == bucket.results("calm"), "the late put changed the output");
        let ask = &mut bucket.on(elbo());
        assert_eq!(json(ask.args(["verify", "--json"]).arg(url(&out)))["ok"], true);
    }
}
