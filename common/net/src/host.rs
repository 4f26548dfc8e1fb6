//! Which names an HTTP side answers to.
//!
//! A page that somebody has open in a browser can have its own name point to an address in here and read what answers
//! there (DNS rebinding): the browser takes both for one site. It says the page's name in its requests, so that asking for
//! a name that is known to be meant keeps such pages out.

use std::net::IpAddr;

use axum::extract::{Request, State};
use axum::http::uri::Authority;
use axum::http::{StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};

/// Names that are answered to, beside addresses and `localhost`.
#[derive(Clone, Debug, Default)]
pub struct Hosts(Vec<String>);

impl Hosts {
    /// Answers to these names; the host's own should be among them.
    pub fn new(names: impl IntoIterator<Item = String>) -> Self {
        Self(names.into_iter().map(|name| plain(&name)).filter(|name| !name.is_empty()).collect())
    }

    /// Whether what a client calls this process, like `host:7601`, is one of its names.
    fn admit(&self, authority: &str) -> bool {
        let Ok(authority) = authority.trim().parse::<Authority>() else { return false };
        let host = plain(authority.host());
        let address = host.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>();
        address.is_ok() || host == "localhost" || self.0.contains(&host)
    }
}

/// A name as it is compared.
fn plain(name: &str) -> String {
    name.trim().trim_end_matches('.').to_ascii_lowercase()
}

/// Refuses requests for another name. Browsers always say one; whoever says none is no browser.
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
    fn addresses_localhost_and_given_names_are_answered_to_and_nothing_else() {
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
