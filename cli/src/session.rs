//! The setup of commands that run a job: devices, limits, the HTTP server, the job's files and its output.

use std::collections::BTreeSet;
use std::num::NonZeroUsize;
use std::path::PathBuf;

use anyhow::Context;
use elbo_coordinator::{Job, JobError, JobOptions};
use elbo_data::Origin;
use elbo_hub::fingerprint::JobIdentity;
use elbo_hub::model_source::{JobModels, ModelSource, Wanted};
use elbo_net::{Hosts, Limits, Operator};
use elbo_store::{Location, Store};
use elbo_worker::Devices;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::args::{DeviceArgs, HttpArgs, RunArgs};
use crate::failure::{bad_policy, usage};
use crate::job_args::{JobArgs, Takes};
use crate::{print, recorded};

/// The requested devices.
pub(crate) fn devices(args: &DeviceArgs) -> anyhow::Result<Devices> {
    let devices: Devices = args.device.as_deref().map_or(Ok(Devices::default()), str::parse).map_err(usage)?;
    devices.find().map_err(usage)
}

/// The threads of each of `workers` engines.
pub(crate) fn threads(device: &DeviceArgs, workers: usize) -> NonZeroUsize {
    let share = NonZeroUsize::new(cores().get() / workers.max(1)).unwrap_or(NonZeroUsize::MIN);
    device.threads.unwrap_or(share)
}

/// The cores that this process may use. Hyperthreads of one core share its multipliers, which one thread keeps busy, so they
/// count once.
pub(crate) fn cores() -> NonZeroUsize {
    let allowed = std::thread::available_parallelism().unwrap_or(NonZeroUsize::MIN);
    physical_cores().map_or(allowed, |cores| cores.min(allowed))
}

/// The cores behind the processors that this process may run on, as Linux tells.
fn physical_cores() -> Option<NonZeroUsize> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let allowed = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:"))?;
    let siblings = |processor: usize| {
        let path = format!("/sys/devices/system/cpu/cpu{processor}/topology/thread_siblings_list");
        std::fs::read_to_string(path).ok()
    };
    let cores: BTreeSet<String> = processors(allowed.trim())?.map(siblings).collect::<Option<_>>()?;
    NonZeroUsize::new(cores.len())
}

/// The numbers in a list like `0-3,8`.
fn processors(list: &str) -> Option<impl Iterator<Item = usize>> {
    let range = |part: &str| {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        Some(first.parse::<usize>().ok()?..=last.parse().ok()?)
    };
    let ranges = list.split(',').map(range).collect::<Option<Vec<_>>>()?;
    Some(ranges.into_iter().flatten())
}

/// Open files besides connections: the output's, the manifest's, logs.
const FILES: u64 = 128;

/// Raises the soft limit of open files, usually 1,024, to the hard limit, since every worker needs a connection. Returns how
/// many connections are possible.
pub(crate) fn allow_connections() -> Limits {
    let limits = Limits::default();
    // If the limit can't be raised, fewer workers can connect.
    let files =
        rlimit::increase_nofile_limit(u64::MAX).or_else(|_| rlimit::getrlimit(rlimit::Resource::NOFILE).map(|l| l.0));
    let fit = files.map_or(limits.connections as u64, |files| files.saturating_sub(FILES).max(FILES));
    Limits { connections: limits.connections.min(usize::try_from(fit).unwrap_or(usize::MAX)), ..limits }
}

/// Starts the HTTP server for operators, if requested.
pub(crate) async fn operate(args: HttpArgs) -> anyhow::Result<Operator> {
    let operator = Operator::default();
    if let Some(address) = args.http {
        let listener = TcpListener::bind(address)
            .await
            .with_context(|| format!("listening on {address}: choose another address with --http"))?;
        print::note(format_args!("status page on http://{}", listener.local_addr()?));
        // The server runs until the process ends, so that it shows the last state.
        let hosts = Hosts::new(args.http_host.into_iter().chain([host()]));
        let serving = operator.clone().serve(listener, hosts, CancellationToken::new());
        tokio::spawn(async move {
            if let Err(error) = serving.await {
                tracing::warn!(%error, "the HTTP server has stopped");
            }
        });
    }
    Ok(operator)
}

/// The name of this host.
pub(crate) fn host() -> String {
    hostname::get().map_or_else(|_| "unknown".into(), |name| name.to_string_lossy().into_owned())
}

/// A job whose files are on this machine.
#[derive(Clone, Debug)]
pub(crate) struct Identified {
    /// The specification and the hashes of the files it names.
    pub(crate) identity: JobIdentity,
    /// The directories with its models' files.
    pub(crate) models: JobModels,
    /// Origins that lists from the network may name. They are not part of the identity because they don't change results.
    pub(crate) origins: Vec<Origin>,
    /// Whether to fail if the listing passes over anything.
    pub(crate) strict: bool,
}

/// Finds or fetches a job's model, completes the job's specification and hashes its files.
pub(crate) async fn identify(flags: &JobArgs) -> anyhow::Result<Identified> {
    let shortlist = flags.shortlist_source()?;
    let models = JobModels::find(&flags.model_source()?, shortlist.as_ref(), print::note).await?;
    let mut spec = flags.to_spec(&Takes::of_model(&models.model)?)?;
    if let Some(out) = &flags.calibration_from {
        spec.calibration = Some(recorded::calibration(out).await?);
    }
    let directories = models.clone();
    let identity = tokio::task::spawn_blocking(move || JobIdentity::new(spec, &directories)).await??;
    Ok(Identified { identity, models, origins: flags.list_origins.clone(), strict: flags.strict })
}

/// The directory of a model, which is fetched if necessary.
pub(crate) async fn resolve(model: &ModelSource, wanted: Wanted) -> anyhow::Result<PathBuf> {
    Ok(model.resolve(wanted, print::note).await?)
}

/// Opens or resumes a job in an output.
pub(crate) async fn open(job: Identified, out: &str, run: &RunArgs) -> anyhow::Result<Job> {
    let store = Store::create(&Location::parse(out)?)?;
    let options = JobOptions {
        fresh: run.fresh,
        retry_quarantined: run.retry_quarantined,
        recompute: run.recompute.clone(),
        origins: job.origins,
        strict: job.strict,
    };
    let opening = Job::open(job.identity, &job.models.model, store.clone(), options);
    let opened = tokio::select! {
        opened = opening => opened,
        // Otherwise the ledger would retry for minutes.
        fault = store.broken() => return Err(fault.into()),
    };
    match opened {
        Err(JobError::Policy(error)) => Err(bad_policy(error)),
        Err(error @ JobError::NoSuchShard(..)) => Err(usage(error)),
        Err(error) => Err(store.fault().map_or_else(|| error.into(), anyhow::Error::from)),
        Ok(job) => Ok(job),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_of_processors_is_understood() {
        let list = |text| processors(text).map(Iterator::collect::<Vec<_>>);
        assert_eq!(list("0-3,8"), Some(vec![0, 1, 2, 3, 8]));
        assert_eq!(list("5"), Some(vec![5]));
        assert_eq!(list("a-b"), None);
        assert!(cores() <= std::thread::available_parallelism().unwrap());
    }
}
