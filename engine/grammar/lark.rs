//! Grammars in Lark's language before they are compiled: within bounds, and so their schemas.

use serde_json::{Deserializer, Value};

use super::{nested_within_bounds, refused, schema};
use crate::error::Error;

/// What stands before a schema in a grammar.
const JSON: &str = "%json";

/// Refuses what has no bounds, and returns the grammar as it is to be compiled.
pub fn checked(text: &str) -> Result<String, Error> {
    let mut pieces = text.split(JSON);
    let mut all = pieces.next().unwrap_or_default().to_string();
    nested_within_bounds(&all)?;
    for piece in pieces {
        let mut values = Deserializer::from_str(piece).into_iter::<Value>();
        let schema = match values.next() {
            Some(Ok(schema)) => schema::bounded(schema)?,
            Some(Err(error)) => return Err(refused(format_args!("{JSON} and no JSON: {error}"))),
            None => return Err(refused(format_args!("{JSON} and nothing behind it"))),
        };
        let rest = &piece[values.byte_offset()..];
        nested_within_bounds(rest)?;
        all.extend([JSON, " ", &schema.to_string(), rest]);
    }
    Ok(all)
}
