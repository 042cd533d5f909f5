//! Whom KV belongs to, as its salt says.
//!
//! Requests find each other's KV only where their salts are the same. The salt of a machine's
//! only user is empty; any other is `TENANT`, a zero byte and what narrows it further: nothing, or
//! a hash of what a client asked for. So a salt can't be made to name another tenant.

use sha2::{Digest, Sha256};

/// Stands before what narrows a salt.
const BORDER: char = '\0';

/// In the place of a tenant: KV that tenants share, which belongs to each that has the chunk.
/// Erased by one of them it is gone, and encoded again for the others.
pub const SHARED: &str = "all tenants";

/// The salt of a tenant's requests; a client's own word narrows it further.
pub fn salt(tenant: &str, narrower: Option<&str>) -> String {
    match narrower {
        None if tenant.is_empty() => String::new(),
        None => format!("{tenant}{BORDER}"),
        Some(word) => {
            let digest = Sha256::digest(word);
            let digits = digest.iter().map(|byte| format!("{byte:02x}"));
            format!("{tenant}{BORDER}{}", digits.collect::<String>())
        }
    }
}

/// The tenant whose salt this is.
pub fn tenant_of(salt: &str) -> &str {
    salt.rsplit_once(BORDER).map_or(salt, |(tenant, _)| tenant)
}

/// Whether KV is a tenant's own, or one of those that all share.
pub fn may_use(tenant: &str, salt: &str) -> bool {
    [tenant, SHARED].contains(&tenant_of(salt))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_salt_names_its_tenant_and_no_other() {
        let tenants = ["", "anna", "anna\0", "\0", "größe\0x"];
        let words = [None, Some(""), Some("x"), Some("\0ben\0")];
        let mut salts = std::collections::BTreeSet::new();
        for tenant in tenants {
            for word in words {
                let salt = salt(tenant, word);
                assert_eq!(tenant_of(&salt), tenant, "{salt:?}");
                assert!(salts.insert(salt), "each is another");
            }
        }
        assert!(salts.contains(""), "nobody's salt is empty");
        for of in tenants {
            let uses = |salt: &String| may_use(of, salt);
            assert_eq!(salts.iter().filter(|salt| uses(salt)).count(), words.len());
            assert!(uses(&salt(SHARED, None)));
        }
    }
}
