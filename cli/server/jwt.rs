//! Tokens of another issuer (JWT) as keys.
//!
//! One algorithm, fixed by the command line: what a token's header says of it is compared, never
//! followed, and no key is fetched from anywhere. `exp` must be there and be a number.

use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result, bail};
use clap::ValueEnum;
use jsonwebtoken::{Algorithm, DecodingKey, Validation, decode};
use serde::Deserialize;

use super::auth::{Principal, Role, Tenant};

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum JwtAlgorithm {
    Hs256,
    Hs384,
    Hs512,
    Rs256,
    Rs384,
    Rs512,
    Ps256,
    Es256,
    Es384,
    #[value(name = "eddsa")]
    EdDsa,
}

/// Knows valid tokens.
pub struct Jwt {
    key: DecodingKey,
    validation: Validation,
}

/// Longer tokens are none.
const LONGEST: usize = 8 << 10;
/// A secret shorter than its digest can be guessed.
const SHORTEST_SECRET: usize = 32;

#[derive(Deserialize)]
struct Claims {
    sub: String,
    /// The least there is, where it is not said.
    role: Option<String>,
}

impl JwtAlgorithm {
    fn algorithm(self) -> Algorithm {
        match self {
            Self::Hs256 => Algorithm::HS256,
            Self::Hs384 => Algorithm::HS384,
            Self::Hs512 => Algorithm::HS512,
            Self::Rs256 => Algorithm::RS256,
            Self::Rs384 => Algorithm::RS384,
            Self::Rs512 => Algorithm::RS512,
            Self::Ps256 => Algorithm::PS256,
            Self::Es256 => Algorithm::ES256,
            Self::Es384 => Algorithm::ES384,
            Self::EdDsa => Algorithm::EdDSA,
        }
    }

    fn key(self, bytes: &[u8]) -> Result<DecodingKey> {
        Ok(match self {
            Self::Hs256 | Self::Hs384 | Self::Hs512 => {
                let secret = bytes.trim_ascii();
                if secret.len() < SHORTEST_SECRET {
                    bail!("the secret has {} bytes, it needs {SHORTEST_SECRET}", secret.len());
                }
                // a public key taken for a secret is known to everybody
                if secret.starts_with(b"-----BEGIN") {
                    bail!("it is a PEM file, which is no secret");
                }
                DecodingKey::from_secret(secret)
            }
            Self::Rs256 | Self::Rs384 | Self::Rs512 | Self::Ps256 => {
                DecodingKey::from_rsa_pem(bytes)?
            }
            Self::Es256 | Self::Es384 => DecodingKey::from_ec_pem(bytes)?,
            Self::EdDsa => DecodingKey::from_ed_pem(bytes)?,
        })
    }
}

impl Jwt {
    pub fn new(path: &Path, algorithm: JwtAlgorithm) -> Result<Self> {
        let read = || fs::read(path).map_err(anyhow::Error::from);
        let key = read().and_then(|bytes| algorithm.key(&bytes));
        let key = key.with_context(|| format!("cannot use the key in {}", path.display()))?;
        Ok(Self::of_key(key, algorithm))
    }

    fn of_key(key: DecodingKey, algorithm: JwtAlgorithm) -> Self {
        let mut validation = Validation::new(algorithm.algorithm());
        validation.set_required_spec_claims(&["exp", "sub"]);
        validation.validate_nbf = true;
        // tokens may name this server or others as their audience
        validation.validate_aud = false;
        Self { key, validation }
    }

    /// Whom a valid token names.
    pub fn principal(&self, token: &str) -> Option<Principal> {
        if token.len() > LONGEST {
            return None;
        }
        let claims = decode::<Claims>(token, &self.key, &self.validation).ok()?.claims;
        let role = claims.role.as_deref().map_or(Some(Role::User), Role::parse)?;
        // an issuer's names are not those of the key file
        (!claims.sub.is_empty())
            .then(|| Principal::new(Tenant(format!("jwt:{}", claims.sub)), role))
    }
}

#[cfg(test)]
mod tests {
    use base64::Engine as _;
    use base64::prelude::BASE64_URL_SAFE_NO_PAD as BASE64;
    use jsonwebtoken::{EncodingKey, Header, encode};
    use serde_json::{Value, json};

    use super::*;

    const SECRET: &[u8] = b"a secret of thirty-two bytes and more";

    fn jwt() -> Jwt {
        let key = JwtAlgorithm::Hs256.key(SECRET).expect("it is long enough");
        Jwt::of_key(key, JwtAlgorithm::Hs256)
    }

    fn signed(algorithm: Algorithm, secret: &[u8], claims: &Value) -> String {
        encode(&Header::new(algorithm), claims, &EncodingKey::from_secret(secret)).unwrap()
    }

    fn claims(extra: Value) -> Value {
        let mut claims = json!({"sub": "anna", "exp": 9_999_999_999_u64});
        claims.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        claims
    }

    #[test]
    fn a_token_names_its_bearer_and_role() {
        let role = |extra| {
            let token = signed(Algorithm::HS256, SECRET, &claims(extra));
            jwt().principal(&token).map(|who| (who.tenant.0, who.role))
        };
        assert_eq!(role(json!({})), Some(("jwt:anna".into(), Role::User)));
        assert_eq!(role(json!({"role": "admin"})), Some(("jwt:anna".into(), Role::Admin)));
        assert_eq!(role(json!({"role": "root"})), None);
        assert_eq!(role(json!({"role": ["admin"]})), None);
        assert_eq!(role(json!({"sub": ""})), None);
        assert_eq!(role(json!({"sub": 3})), None);
        assert_eq!(role(json!({"aud": "other"})), Some(("jwt:anna".into(), Role::User)));
    }

    #[test]
    fn a_token_must_end_at_a_time_that_is_a_number() {
        let accepts =
            |claims: &Value| jwt().principal(&signed(Algorithm::HS256, SECRET, claims)).is_some();
        for exp in [json!(1), json!(0), json!(-1), json!("9999999999"), json!(null), json!({})] {
            assert!(!accepts(&claims(json!({"exp": exp}))), "{exp}");
        }
        assert!(!accepts(&json!({"sub": "anna"})));
        assert!(!accepts(&json!({"exp": 9_999_999_999_u64})));
        assert!(!accepts(&claims(json!({"nbf": 9_999_999_998_u64}))));
        assert!(!accepts(&claims(json!({"nbf": "9999999998"}))));
        assert!(accepts(&claims(json!({"nbf": 1}))));
    }

    #[test]
    fn no_other_signature_counts() {
        let good = signed(Algorithm::HS256, SECRET, &claims(json!({})));
        let (head, signature) = good.rsplit_once('.').unwrap();
        let (header, payload) = head.split_once('.').unwrap();
        let part = |value: Value| BASE64.encode(value.to_string());
        let admin = part(claims(json!({"role": "admin"})));
        let none = part(json!({"alg": "none", "typ": "JWT"}));
        let odd = part(json!({"alg": "nOnE"}));
        let missing = part(json!({"typ": "JWT"}));
        let critical = part(json!({"alg": "HS256", "crit": ["exp"], "kid": "../x"}));
        let mut forged = vec![
            String::new(),
            "a.b.c".into(),
            head.to_owned(),
            format!("{head}."),
            format!("{header}.{admin}.{signature}"),
            format!("{}{good}", "x".repeat(100_000)),
            signed(Algorithm::HS512, SECRET, &claims(json!({}))),
            signed(Algorithm::HS256, b"another secret of thirty-two bytes..", &claims(json!({}))),
        ];
        for header in [none, odd, missing, critical] {
            forged.push(format!("{header}.{payload}."));
            forged.push(format!("{header}.{payload}.{signature}"));
        }
        for token in forged {
            assert!(jwt().principal(&token).is_none(), "{token:.120}");
        }
        assert!(jwt().principal(&good).is_some());
    }

    #[test]
    fn a_public_key_is_no_secret() {
        let pem = b"-----BEGIN PUBLIC KEY-----\nMCowBQYDK2VwAyEA\n-----END PUBLIC KEY-----";
        assert!(JwtAlgorithm::Hs256.key(pem).is_err());
        assert!(JwtAlgorithm::Hs256.key(b"short").is_err());
        assert!(JwtAlgorithm::Rs256.key(SECRET).is_err());
    }
}
