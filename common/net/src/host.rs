//! Which host names an HTTP server answers to.
//!
//! A web page in someone's browser can point its own name to an internal address and read the responses from there (DNS
//! rebinding), because the browser takes both for one site. But the browser sends the page's name in its requests, so requiring
//! a known name keeps such pages out.

use std::net::IpAddr;

use axum::extract::{Request, State};
use axum::http::uri::Authority;
use axum::http::{StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};

/// The names to answer to, in addition to addresses and `localhost`.
#[derive(Clone, Debug, Default)]
pub struct Hosts(Vec<String>);

impl Hosts {
    /// Answers to these names, which should include the host's own.
    pub fn new(names: impl IntoIterator<Item = String>) -> Self {
        Self(names.into_iter().map(|name| plain(&name)).filter(|name| !name.is_empty()).collect())
    }

    /// Whether the host a client asks for, like `host:7601`, is one of the names.
    fn admit(&self, authority: &str) -> bool {
        let Ok(authority) = authority.trim().parse::<Authority>() else { return false };
        let host = plain(authority.host());
        let address = host.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>();
        address.is_ok() || host == "localhost" || self.0.contains(&host)
    }
}

/// A name in the form used for comparison.
fn plain(name: &str) -> String {
    name.trim().trim_end_matches('.').to_ascii_lowercase()
}

/// Refuses requests for other names. Browsers always send a name, so a request without one does not come from a browser.
pub(crate) async fn check(State(hosts): State<Hosts>, request: Request, next: Next) -> Response {
    let named = request.headers().get_all(header::HOST).iter().map(|host| host.to_str().unwrap_or_default());
    let mut names = named.chain(request.uri().authority().map(Authority::as_str));
    if names.all(|name| hosts.admit(name)) {
        return next.run(request).await;
    }
    let told = "this process does not answer to that name: use its address, localhost or the name of its host, or start \
                it with --http-host NAME (ELBO_HTTP_HOST)\n";
    (StatusCode::MISDIRECTED_REQUEST, told).into_response()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_addresses_localhost_and_given_names_are_answered_to() {
        let hosts = Hosts::new(["Node-1.Example.".to_owned(), String::new(), "elbo-coordinator".into()]);
        for name in [
            "10.0.0.7:7601",
            "127.0.0.1",
            "[::1]:7601",
            "localhost:7601",
            "LOCALHOST",
            "node-1.example:7601",
            "node-1.example.",
            "elbo-coordinator",
        ] {
            assert!(hosts.admit(name), "{name}");
        }
        for name in
            ["evil.example", "node-1", "elbo-coordinator.evil.example", "127.0.0.1.evil.example:7601", "", "a b"]
        {
            assert!(!hosts.admit(name), "{name}");
        }
    }
}
