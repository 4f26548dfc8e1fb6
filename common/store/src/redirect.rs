//! Follows a web server's redirects, but not from outside into this machine or its network.
//!
//! Images behind a redirect to another host are common: content delivery networks work that way. But an outside server could
//! redirect its clients to an internal address, and make them read data that only they can reach, such as a cloud's metadata.

use std::net::{IpAddr, Ipv6Addr};

use object_store::ClientOptions;
use object_store::client::{HttpClient, HttpConnector};
use reqwest::redirect::Policy;
use url::{Host, Url};

use super::pace::{CONNECT_TIMEOUT, READ_TIMEOUT};
use super::web::Lenient;

/// The most consecutive redirects to follow.
const FOLLOWED: usize = 10;

/// Creates clients that follow redirects from outside only to outside. Names are not resolved for this check: it covers only
/// addresses and names that are internal by themselves.
#[derive(Debug)]
pub(super) struct OutwardRedirects;

impl HttpConnector for OutwardRedirects {
    /// The client's options are those of [`super::open`].
    fn connect(&self, _: &ClientOptions) -> object_store::Result<HttpClient> {
        // Compressed responses are not requested, since their size would differ from the reported one.
        let client = reqwest::Client::builder()
            .user_agent(concat!("elbo/", env!("CARGO_PKG_VERSION")))
            .connect_timeout(CONNECT_TIMEOUT)
            .read_timeout(READ_TIMEOUT)
            .no_gzip()
            .no_brotli()
            .no_zstd()
            .no_deflate()
            .redirect(Policy::custom(|attempt| {
                if is_followed(attempt.previous(), attempt.url()) { attempt.follow() } else { attempt.stop() }
            }))
            .build();
        let client = client.map_err(|e| object_store::Error::Generic { store: "HTTP", source: Box::new(e) })?;
        Ok(HttpClient::new(Lenient(HttpClient::new(client))))
    }
}

/// Whether to follow a redirect to a URL, given the URLs before it.
fn is_followed(before: &[Url], to: &Url) -> bool {
    before.len() <= FOLLOWED && (before.first().is_some_and(is_inside) || !is_inside(to))
}

/// Whether a URL's host is this machine or its network.
fn is_inside(url: &Url) -> bool {
    match url.host() {
        None => true,
        Some(Host::Domain(name)) => {
            let name = name.trim_end_matches('.');
            name == "localhost" || name.ends_with(".localhost") || name.ends_with(".internal")
        }
        Some(Host::Ipv4(address)) => is_inside_address(address.into()),
        Some(Host::Ipv6(address)) => is_inside_address(address.into()),
    }
}

fn is_inside_address(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(v4) => {
            let [a, b, ..] = v4.octets();
            // The last range is shared by providers among customers (RFC 6598).
            v4.is_loopback()
                || v4.is_private()
                || v4.is_link_local()
                || v4.is_broadcast()
                || a == 0
                || (a == 100 && b & 0xc0 == 64)
        }
        IpAddr::V6(v6) => match v6.to_ipv4_mapped() {
            Some(v4) => is_inside_address(v4.into()),
            None => {
                v6.is_loopback() || v6 == Ipv6Addr::UNSPECIFIED || v6.is_unique_local() || v6.is_unicast_link_local()
            }
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn outside_servers_cannot_redirect_requests_inside() {
        let url = |text: &str| Url::parse(text).unwrap();
        let (outside, cdn) = (url("https://host.example/a.png"), url("https://cdn.example/a.png"));
        let (inside, metadata) = (url("http://10.0.0.5/a.png"), url("http://169.254.169.254/latest/meta-data"));
        assert!(is_followed(std::slice::from_ref(&outside), &cdn));
        assert!(
            !is_followed(std::slice::from_ref(&outside), &metadata) && !is_followed(&[outside.clone(), cdn], &inside)
        );
        assert!(is_followed(std::slice::from_ref(&inside), &inside) && is_followed(&[inside], &outside));
        assert!(!is_followed(&vec![outside.clone(); FOLLOWED + 1], &outside));
    }

    #[test]
    fn addresses_and_names_of_this_machine_and_its_network_are_inside() {
        let inside = |host: &str| is_inside(&Url::parse(&format!("http://{host}/x")).unwrap());
        for host in [
            "127.0.0.1:80",
            "2130706433",
            "0x7f.1",
            "169.254.169.254",
            "10.1.2.3",
            "192.168.0.1",
            "172.31.0.1",
            "100.64.0.1",
            "0.0.0.0",
            "[::1]",
            "[::ffff:10.0.0.1]",
            "[fd00::1]",
            "[fe80::1]",
            "localhost",
            "LOCALHOST.",
            "metadata.google.internal",
        ] {
            assert!(inside(host), "{host}");
        }
        for host in ["example.org", "93.184.216.34", "172.32.0.1", "[2606:2800::1]", "localhost.example"] {
            assert!(!inside(host), "{host}");
        }
    }
}
