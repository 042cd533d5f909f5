//! How large a schema becomes when its parts are joined.
//!
//! `allOf`, references beside other keywords and lists of alternatives are multiplied out. An
//! upper bound of that is found here without doing it.

use std::collections::HashMap;

use serde_json::{Map, Value};

use super::refused;
use crate::error::Error;

/// Schemas that one may become.
const MAX_SIZE: u64 = 200_000;

/// Keywords that say nothing about values.
const SILENT: [&str; 9] = [
    "$schema",
    "$id",
    "$defs",
    "definitions",
    "title",
    "description",
    "default",
    "examples",
    "$comment",
];

/// So many alternatives, each of at most so many schemas.
#[derive(Debug, Clone, Copy)]
struct Size {
    alternatives: u64,
    each: u64,
}

impl Size {
    const ONE: Self = Self { alternatives: 1, each: 1 };

    fn all(self) -> u64 {
        self.alternatives.saturating_mul(self.each)
    }

    /// Both must hold.
    fn and(self, other: Self) -> Self {
        let alternatives = self.alternatives.saturating_mul(other.alternatives);
        Self { alternatives, each: self.each.saturating_add(other.each) }
    }

    /// One of them must hold.
    fn or(self, other: Self) -> Self {
        let alternatives = self.alternatives.saturating_add(other.alternatives);
        Self { alternatives, each: self.each.max(other.each) }
    }
}

/// Measures the schemas of one document.
pub struct Sizes<'a> {
    root: &'a Value,
    /// By reference; those that are being measured count as one.
    known: HashMap<&'a str, Size>,
}

impl<'a> Sizes<'a> {
    pub fn new(root: &'a Value) -> Self {
        Self { root, known: HashMap::new() }
    }

    /// Refuses a document that becomes too large.
    pub fn check(mut self) -> Result<(), Error> {
        self.of(self.root, false).map(drop)
    }

    /// `joined`: other schemas must hold beside it.
    fn of(&mut self, schema: &'a Value, joined: bool) -> Result<Size, Error> {
        let Value::Object(schema) = schema else { return Ok(Size::ONE) };
        let speaks = |keyword: &&String| !SILENT.contains(&keyword.as_str());
        let joined = joined || schema.keys().filter(speaks).count() > 1;
        let mut size = Size::ONE;
        for (keyword, value) in schema {
            size = size.and(match (keyword.as_str(), value) {
                ("anyOf" | "oneOf", Value::Array(options)) => self.any(options, joined)?,
                ("allOf", Value::Array(list)) => {
                    let mut all = Size::ONE;
                    for one in list {
                        all = all.and(self.of(one, joined || list.len() > 1)?);
                    }
                    all
                }
                ("enum", Value::Array(values)) => {
                    Size { alternatives: values.len().max(1) as u64, each: 1 }
                }
                ("$ref", Value::String(target)) if joined => self.of_target(target)?,
                (
                    "properties" | "patternProperties" | "$defs" | "definitions",
                    Value::Object(map),
                ) => self.inside(map)?,
                ("prefixItems" | "items", Value::Array(list)) => self.sum(list.iter())?,
                ("items" | "additionalItems" | "additionalProperties", value) => {
                    self.sum(std::iter::once(value))?
                }
                _ => Size { alternatives: 1, each: 0 },
            });
            if size.all() > MAX_SIZE {
                let reason = format!("its parts combine to more than {MAX_SIZE} schemas");
                return Err(refused(format!("the schema is too large: {reason}")));
            }
        }
        Ok(size)
    }

    fn any(&mut self, options: &'a [Value], joined: bool) -> Result<Size, Error> {
        let mut any = Size { alternatives: 0, each: 0 };
        for option in options {
            any = any.or(self.of(option, joined)?);
        }
        Ok(if options.is_empty() { Size::ONE } else { any })
    }

    fn inside(&mut self, map: &'a Map<String, Value>) -> Result<Size, Error> {
        self.sum(map.values())
    }

    /// Schemas of values inside the value.
    fn sum(&mut self, schemas: impl Iterator<Item = &'a Value>) -> Result<Size, Error> {
        let mut each = 0u64;
        for schema in schemas {
            each = each.saturating_add(self.of(schema, false)?.all());
        }
        Ok(Size { alternatives: 1, each })
    }

    fn of_target(&mut self, target: &'a str) -> Result<Size, Error> {
        if let Some(&known) = self.known.get(target) {
            return Ok(known);
        }
        let found = target.strip_prefix('#').and_then(|path| self.root.pointer(path));
        let Some(found) = found else { return Ok(Size::ONE) };
        self.known.insert(target, Size::ONE);
        let size = self.of(found, true)?;
        self.known.insert(target, size);
        Ok(size)
    }
}
