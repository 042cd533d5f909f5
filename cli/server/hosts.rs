//! Which names a client may call this server by.
//!
//! A page of a foreign site that has its name resolve to this machine (DNS rebinding) still sends
//! its own name. On loopback, where browsers of this machine reach the server, only loopback's
//! names pass.

use std::net::{IpAddr, SocketAddr};

use axum::http::{HeaderMap, Version, header};

use super::error::ApiError;

/// The names that pass; all of them by default.
#[derive(Default)]
pub struct Hosts {
    /// `None`: all of them.
    allowed: Option<Vec<String>>,
}

impl Hosts {
    /// For a server that listens there, and is also known by `others`.
    pub fn new(address: SocketAddr, others: &[String]) -> Self {
        let guarded = address.ip().is_loopback() || !others.is_empty();
        let lower = || others.iter().map(|name| name.to_ascii_lowercase());
        let own = [address.ip().to_string(), "localhost".to_owned()];
        Self { allowed: guarded.then(|| own.into_iter().chain(lower()).collect()) }
    }

    /// Refuses a request that calls the server by another name, or by none or several.
    pub fn check(&self, version: Version, headers: &HeaderMap) -> Result<(), ApiError> {
        let mut values = headers.get_all(header::HOST).iter();
        let host = match (values.next(), values.next()) {
            (None, _) if version == Version::HTTP_10 => return Ok(()),
            (Some(host), None) => host.to_str().ok().and_then(name_of),
            _ => None,
        };
        let Some(host) = host else {
            return Err(ApiError::bad_request("exactly one Host header is needed, HOST:PORT"));
        };
        let passes = |allowed: &Vec<String>| {
            let is_loopback = || host.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback());
            allowed.iter().any(|name| name.eq_ignore_ascii_case(host)) || is_loopback()
        };
        if self.allowed.as_ref().is_none_or(passes) {
            return Ok(());
        }
        let message = format!("this server is not {host:?}; --allowed-host adds names");
        Err(ApiError::forbidden(&message))
    }
}

/// `NAME[:PORT]` without its port, `[::1]` without its brackets; `None` for anything else.
fn name_of(host: &str) -> Option<&str> {
    let (name, port) = match host.strip_prefix('[') {
        Some(rest) => {
            let (name, port) = rest.split_once(']')?;
            (name, if port.is_empty() { None } else { Some(port.strip_prefix(':')?) })
        }
        None => host.split_once(':').map_or((host, None), |(name, port)| (name, Some(port))),
    };
    let letters = |byte: u8| byte.is_ascii_alphanumeric() || b"-._:".contains(&byte);
    let is_name = !name.is_empty() && name.bytes().all(letters);
    let is_port = port.is_none_or(|port| port.parse::<u16>().is_ok());
    (is_name && is_port).then_some(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(hosts: &Hosts, values: &[&str]) -> u16 {
        let mut headers = HeaderMap::new();
        for value in values {
            headers.append(header::HOST, value.parse().unwrap());
        }
        let answer = hosts.check(Version::HTTP_11, &headers);
        answer.map_or_else(|error| error.status.as_u16(), |()| 200)
    }

    #[test]
    fn on_loopback_only_its_own_names_pass() {
        let hosts = Hosts::new("127.0.0.1:8000".parse().unwrap(), &["my.box".into()]);
        for host in ["127.0.0.1:8000", "localhost", "LOCALHOST:1", "[::1]:8000", "My.Box:80"] {
            assert_eq!(status(&hosts, &[host]), 200, "{host}");
        }
        for host in ["evil.example", "10.0.0.1:8000", "localhost.evil.example"] {
            assert_eq!(status(&hosts, &[host]), 403, "{host}");
        }
        for host in ["x/?", "a/v1", "", "localhost:", "localhost:x", "[::1", "a b"] {
            assert_eq!(status(&hosts, &[host]), 400, "{host}");
        }
        assert_eq!(status(&hosts, &["localhost", "localhost"]), 400);
        assert_eq!(status(&hosts, &[]), 400);
    }

    #[test]
    fn elsewhere_any_name_passes_until_some_are_given() {
        let address = "0.0.0.0:8000".parse().unwrap();
        assert_eq!(status(&Hosts::new(address, &[]), &["any.example"]), 200);
        let named = Hosts::new(address, &["api.example".into()]);
        assert_eq!(status(&named, &["api.example"]), 200);
        assert_eq!(status(&named, &["any.example"]), 403);
    }
}
