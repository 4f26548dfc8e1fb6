//! A worker's heartbeats: they say that it is alive, what it is doing, and which blocks it has in hand.
//!
//! They are sent separately from requests for work, so that a long batch or a slow storage never looks like a dead worker.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use elbo_core::ids::LeaseKey;
use elbo_proto::v1;

use crate::call_error::CallError;
use crate::client::Client;
use crate::engine::Engine;
use crate::held::Held;

/// The state that a worker's heartbeats report.
#[derive(Debug, Default)]
pub(crate) struct Heartbeats {
    engine: Mutex<Option<Arc<Engine>>>,
    /// Evaluations acknowledged.
    pub(crate) acknowledged: Arc<AtomicU64>,
    /// Samples read and encoded.
    pub(crate) prepared: Arc<AtomicU64>,
    pub(crate) held: Held,
}

impl Heartbeats {
    /// Sets the engine, once the model is loaded.
    pub(crate) fn start(&self, engine: Arc<Engine>) {
        *self.engine.lock().unwrap_or_else(PoisonError::into_inner) = Some(engine);
    }

    /// Lets the process end without waiting for the engine's running batches.
    pub(crate) fn abandon(&self) {
        if let Some(engine) = self.engine.lock().unwrap_or_else(PoisonError::into_inner).as_ref() {
            engine.abandon();
        }
    }

    /// Evaluations done, and the worker's activity.
    fn now(&self) -> (u64, v1::Activity) {
        let engine = self.engine.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(engine) = engine.as_ref() else { return (0, v1::Activity::Loading) };
        let activity = match (engine.is_busy(), self.held.is_empty()) {
            (true, _) => v1::Activity::Computing,
            (false, false) => v1::Activity::Preparing,
            (false, true) => v1::Activity::Waiting,
        };
        (engine.evaluated(), activity)
    }

    /// Sends heartbeats until the coordinator wants no more.
    pub(crate) async fn beat(&self, client: &Client, host: &str, device: &str, every: Duration) {
        let mut last = (v1::Activity::Unspecified, 0);
        let mut since = Instant::now();
        loop {
            let (evaluated, activity) = self.now();
            let progress = (activity, evaluated + self.prepared.load(Ordering::Relaxed));
            if progress != last {
                (last, since) = (progress, Instant::now());
            }
            let sign = v1::HeartbeatRequest {
                unreported_evaluations: evaluated.saturating_sub(self.acknowledged.load(Ordering::Relaxed)),
                held: self.held.leases(),
                activity: activity.into(),
                quiet_ms: since.elapsed().as_millis() as u64,
                ..v1::HeartbeatRequest::default()
            };
            match client.heartbeat(sign).await {
                Ok(reply) => self.held.abandon(reply.unwanted.iter().map(LeaseKey::from)),
                Err(CallError::Rejoin) => drop(client.join(host, device, self.held.blocks()).await),
                Err(CallError::Fatal(_)) => return,
                Err(CallError::Rejected(_) | CallError::OtherJob) => {}
            }
            tokio::time::sleep(every).await;
        }
    }
}
