//! Who speaks: keys and roles.
//!
//! A key is known by its SHA-256 alone, and digests are compared in constant time, all of them.
//! Without any key configured everybody is the one tenant, and may do everything.

use std::fs;
use std::net::IpAddr;
use std::path::Path;

use anyhow::{Context as _, Result, bail};
use axum::extract::FromRequestParts;
use axum::http::request::Parts;
use axum::http::{Extensions, HeaderMap, header};
use sha2::{Digest, Sha256};
use strand_engine::tenant;
use subtle::{Choice, ConstantTimeEq};

use super::error::ApiError;
use super::jwt::Jwt;

/// Whom chunks, contexts and cached KV belong to. The empty name is everybody's.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Tenant(pub String);

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Role {
    User,
    Admin,
}

/// Who sent a request, as its key says. An extension of every request that needs a key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Principal {
    pub tenant: Tenant,
    pub role: Role,
    /// Whom quotas count: the tenant, or the address where nobody needs a key.
    pub payer: Tenant,
}

/// The network address that a connection comes from: of IPv6 the half that is one customer's. What
/// headers say of others before it counts for nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Peer(IpAddr);

impl Peer {
    pub fn new(address: IpAddr) -> Self {
        Self(match address.to_canonical() {
            IpAddr::V4(address) => IpAddr::V4(address),
            IpAddr::V6(address) => IpAddr::V6((address.to_bits() >> 64 << 64).into()),
        })
    }

    /// Of the connection that brought a request.
    pub fn of(extensions: &Extensions) -> Self {
        let peer = extensions.get().copied();
        peer.expect("the listener says where each connection comes from")
    }
}

/// What a route asks of a principal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// Nothing, not even a key.
    Open,
    User,
    Admin,
}

/// All keys there are.
#[derive(Default)]
pub struct Keys {
    entries: Vec<Key>,
    /// Of whom tokens are taken too.
    pub jwt: Option<Jwt>,
}

struct Key {
    digest: [u8; 32],
    principal: Principal,
}

impl Tenant {
    /// What KV that is this tenant's alone is found by; a client's own salt narrows it further.
    pub fn salt(&self, cache_salt: Option<&str>) -> String {
        tenant::salt(&self.0, cache_salt)
    }
}

impl Role {
    pub fn parse(text: &str) -> Option<Self> {
        match text {
            "user" => Some(Self::User),
            "admin" => Some(Self::Admin),
            _ => None,
        }
    }
}

impl Principal {
    pub fn new(tenant: Tenant, role: Role) -> Self {
        Self { payer: tenant.clone(), tenant, role }
    }

    /// Everybody, where no key is configured.
    pub fn everybody(peer: Peer) -> Self {
        let payer = Tenant(peer.0.to_string());
        Self { tenant: Tenant(String::new()), role: Role::Admin, payer }
    }

    pub fn may(&self, access: Access) -> bool {
        access != Access::Admin || self.role == Role::Admin
    }
}

impl<S: Send + Sync> FromRequestParts<S> for Principal {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, ApiError> {
        parts.extensions.get::<Self>().cloned().ok_or_else(ApiError::internal)
    }
}

impl Keys {
    /// Keys of the command line, which may do everything, and those of a file.
    pub fn new(keys: &[String], file: Option<&Path>) -> Result<Self> {
        let mut all = Self::default();
        for key in keys {
            if key.is_empty() {
                bail!("--api-key is empty");
            }
            let digest = digest(key);
            // the same tenant in the next run, in whatever order the keys are given
            let tenant = Tenant(format!("key-{}", &hex(&digest)[..16]));
            all.entries.push(Key { digest, principal: Principal::new(tenant, Role::Admin) });
        }
        if let Some(path) = file {
            let read = || fs::read_to_string(path).map_err(anyhow::Error::from);
            let text = read().and_then(|text| Self::parse(&text));
            let mut from_file =
                text.with_context(|| format!("cannot use the keys in {}", path.display()))?;
            all.entries.append(&mut from_file.entries);
        }
        Ok(all)
    }

    fn parse(text: &str) -> Result<Self> {
        let mut keys = Self::default();
        for (number, line) in (1..).zip(text.lines()) {
            let line = line.trim();
            if line.is_empty() || line.starts_with('#') {
                continue;
            }
            let words: Vec<&str> = line.split_whitespace().collect();
            let [name, role, key] = words[..] else {
                bail!("line {number} is not a name, a role and a key");
            };
            let Some(role) = Role::parse(role) else {
                bail!("line {number}: the role is {role}, it must be user or admin");
            };
            let digest = digest_of_hex(key).unwrap_or_else(|| digest(key));
            let principal = Principal::new(Tenant(name.to_owned()), role);
            keys.entries.push(Key { digest, principal });
        }
        if keys.entries.is_empty() {
            bail!("there is none");
        }
        Ok(keys)
    }

    /// True where nobody needs a key.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty() && self.jwt.is_none()
    }

    /// Who sent these headers.
    pub fn principal(&self, headers: &HeaderMap, peer: Peer) -> Result<Principal, ApiError> {
        if self.is_empty() {
            return Ok(Principal::everybody(peer));
        }
        let presented = bearer(headers).ok_or_else(|| {
            ApiError::unauthorized("a key is needed, as the header Authorization: Bearer KEY")
        })?;
        let by_token = || self.jwt.as_ref().and_then(|jwt| jwt.principal(presented));
        self.find(presented)
            .or_else(by_token)
            .ok_or_else(|| ApiError::unauthorized("the key is not known here"))
    }

    /// Looks at every key, however early it is found.
    fn find(&self, presented: &str) -> Option<Principal> {
        let presented = digest(presented);
        let mut found = None;
        for key in &self.entries {
            let same: Choice = key.digest.ct_eq(&presented);
            if bool::from(same) {
                found = Some(&key.principal);
            }
        }
        found.cloned()
    }
}

/// The key of `Authorization: Bearer KEY`.
fn bearer(headers: &HeaderMap) -> Option<&str> {
    let mut values = headers.get_all(header::AUTHORIZATION).iter();
    let (value, others) = (values.next()?, values.next());
    let (scheme, key) = value.to_str().ok()?.split_once(' ')?;
    let key = key.trim();
    (others.is_none() && scheme.eq_ignore_ascii_case("bearer") && !key.is_empty()).then_some(key)
}

fn digest(key: &str) -> [u8; 32] {
    Sha256::digest(key).into()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// 64 lower-case hex digits.
fn digest_of_hex(text: &str) -> Option<[u8; 32]> {
    let is_hex = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
    if text.len() != 64 || !text.bytes().all(is_hex) {
        return None;
    }
    let mut digest = [0; 32];
    for (byte, digits) in digest.iter_mut().zip(text.as_bytes().chunks(2)) {
        let digits = std::str::from_utf8(digits).ok()?;
        *byte = u8::from_str_radix(digits, 16).ok()?;
    }
    Some(digest)
}

#[cfg(test)]
mod tests {
    use super::*;

    const PEER: Peer = Peer(IpAddr::V4(std::net::Ipv4Addr::LOCALHOST));

    #[test]
    fn half_of_a_long_address_is_the_whole_of_a_peer() {
        let peer = |text: &str| Peer::new(text.parse().unwrap());
        assert_eq!(peer("2001:db8:1:2:3:4:5:6"), peer("2001:db8:1:2::1"));
        assert_ne!(peer("2001:db8:1:2::1"), peer("2001:db8:1:3::1"));
        assert_eq!(peer("::ffff:192.0.2.1"), peer("192.0.2.1"));
        assert_ne!(peer("192.0.2.1"), peer("192.0.2.2"));
    }

    fn with(value: &str) -> HeaderMap {
        let mut headers = HeaderMap::new();
        headers.insert(header::AUTHORIZATION, value.parse().unwrap());
        headers
    }

    #[test]
    fn a_key_is_found_by_itself_or_by_its_digest() {
        let text = format!("# all of them\nanna user anna-key\nben admin {}\n", hex(&digest("b")));
        let keys = Keys::parse(&text).unwrap();
        let anna = keys.principal(&with("Bearer anna-key"), PEER).unwrap();
        assert_eq!((anna.tenant.0.as_str(), anna.role), ("anna", Role::User));
        let ben = keys.principal(&with("bearer b"), PEER).unwrap();
        assert_eq!((ben.tenant.0.as_str(), ben.role), ("ben", Role::Admin));
        assert!(ben.may(Access::Admin) && !anna.may(Access::Admin) && anna.may(Access::User));
        for value in ["Bearer ", "Bearer", "Basic anna-key", "anna-key", "Bearer anna-key x"] {
            assert_eq!(keys.principal(&with(value), PEER).unwrap_err().status, 401, "{value}");
        }
        assert_eq!(keys.principal(&HeaderMap::new(), PEER).unwrap_err().status, 401);
        let mut twice = with("Bearer anna-key");
        twice.append(header::AUTHORIZATION, "Bearer b".parse().unwrap());
        assert_eq!(keys.principal(&twice, PEER).unwrap_err().status, 401);
    }

    #[test]
    fn mistakes_in_the_file_are_named_by_line() {
        let message = |text: &str| Keys::parse(text).err().expect("it is wrong").to_string();
        assert_eq!(message("anna user"), "line 1 is not a name, a role and a key");
        assert_eq!(message("\nanna root x"), "line 2: the role is root, it must be user or admin");
        assert_eq!(message("# none"), "there is none");
    }

    #[test]
    fn salts_part_tenants_and_what_a_tenant_parts_itself() {
        let (nobody, anna) = (Tenant(String::new()), Tenant("anna".into()));
        assert_eq!(nobody.salt(None), "");
        let salts = [nobody.salt(Some("anna")), anna.salt(None), anna.salt(Some("x"))];
        assert!(salts[0] != salts[1] && salts[1] != salts[2]);
        assert_eq!(salts.map(|salt| tenant::tenant_of(&salt).to_owned()), ["", "anna", "anna"]);
    }
}
