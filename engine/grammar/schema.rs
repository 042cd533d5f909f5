//! JSON schemas before they are compiled: within bounds, and on their own.
//!
//! What keywords mean is llguidance's business; it refuses those it can't hold to. Here are the
//! bounds it doesn't have: a schema's parts are multiplied with each other when they are joined.

mod size;

use serde_json::{Map, Value, json};

use crate::error::Error;
use size::Sizes;

/// Schemas in a schema.
const MAX_SCHEMAS: usize = 10_000;
/// Values of all lists of values.
const MAX_VALUES: usize = 10_000;
/// Patterns of property names, each of which is compared with all others.
const MAX_PATTERNS: usize = 50;
/// Most that may be demanded of a text or a list: more than an answer holds.
const MAX_LEAST: u64 = 10_000;
/// Between two parts, at most: some models would go on with spaces and line ends for ever.
const WHITESPACE: &str = r"\x20";

/// Times as all who read them understand them: no leap seconds, no fractions without end.
const TIME: &str = r":[0-5][0-9](\.[0-9]{1,6})?([zZ]|[+-][0-9]{2}:[0-9]{2})$";

/// Reads a schema, refuses what has no bounds, and returns it as it is to be compiled.
pub fn checked(text: &str) -> Result<Value, Error> {
    let schema: Value = serde_json::from_str(text)
        .map_err(|error| refused(format!("the schema is not JSON: {error}")))?;
    bounded(schema)
}

/// The same for a schema that has been read.
pub fn bounded(mut schema: Value) -> Result<Value, Error> {
    if !schema.is_object() {
        return Err(refused("the schema must be an object".into()));
    }
    let root = schema.clone();
    let mut counts = Counts::default();
    counts.visit(&mut schema, &root)?;
    Sizes::new(&schema).check()?;
    // whatever was asked for here: these are options of the compiler, not of a schema
    let options = json!({"whitespace_pattern": WHITESPACE});
    schema.as_object_mut().expect("seen above").insert("x-guidance".into(), options);
    Ok(schema)
}

fn refused(reason: String) -> Error {
    Error::Grammar { reason }
}

/// What has been seen of a schema.
#[derive(Default)]
struct Counts {
    schemas: usize,
    values: usize,
    patterns: usize,
}

impl Counts {
    fn visit(&mut self, schema: &mut Value, root: &Value) -> Result<(), Error> {
        self.schemas += 1;
        most("schemas", self.schemas, MAX_SCHEMAS)?;
        let Value::Object(schema) = schema else { return Ok(()) };
        self.count(schema)?;
        if let Some(Value::String(target)) = schema.get("$ref")
            && !target.starts_with('#')
        {
            return Err(refused(format!("$ref {target:?} is outside the schema; put it in $defs")));
        }
        if let Some(Value::Array(options)) = schema.get_mut("oneOf") {
            options.iter_mut().for_each(|option| inline(option, root));
        }
        if matches!(schema.get("format").and_then(Value::as_str), Some("time" | "date-time")) {
            let all = schema.entry("allOf").or_insert_with(|| json!([]));
            all.as_array_mut().into_iter().for_each(|all| all.push(json!({"pattern": TIME})));
        }
        parts_mut(schema).try_for_each(|part| self.visit(part, root))
    }

    fn count(&mut self, schema: &Map<String, Value>) -> Result<(), Error> {
        let len = |keyword: &str| match schema.get(keyword) {
            Some(Value::Array(list)) => list.len(),
            Some(Value::Object(map)) => map.len(),
            _ => 0,
        };
        self.values += len("enum");
        most("values in enums", self.values, MAX_VALUES)?;
        self.patterns += len("patternProperties");
        most("patternProperties", self.patterns, MAX_PATTERNS)?;
        for keyword in ["minItems", "minLength", "minProperties"] {
            match schema.get(keyword).and_then(Value::as_u64) {
                Some(least) if least > MAX_LEAST => {
                    let reason = format!("{keyword} is {least}, it must be at most {MAX_LEAST}");
                    return Err(refused(reason));
                }
                _ => {}
            }
        }
        Ok(())
    }
}

fn most(what: &str, count: usize, most: usize) -> Result<(), Error> {
    if count > most {
        return Err(refused(format!("the schema has more than {most} {what}")));
    }
    Ok(())
}

/// Puts what a bare `$ref` names in its place: whether one option alone can hold is seen from the
/// options themselves.
fn inline(option: &mut Value, root: &Value) {
    let Some(target) = option.get("$ref").and_then(Value::as_str) else { return };
    let is_bare = option.as_object().is_some_and(|option| option.len() == 1);
    let found = target.strip_prefix('#').and_then(|path| root.pointer(path));
    if let Some(found) = found.filter(|_| is_bare) {
        *option = found.clone();
    }
}

/// Keywords whose value is a schema or a list of them.
const PLAIN: [&str; 7] =
    ["allOf", "anyOf", "oneOf", "items", "prefixItems", "additionalItems", "additionalProperties"];
/// Keywords whose value has schemas by name.
const NAMED: [&str; 4] = ["properties", "patternProperties", "$defs", "definitions"];

/// The schemas that a schema consists of.
fn parts_mut(schema: &mut Map<String, Value>) -> impl Iterator<Item = &mut Value> {
    schema.iter_mut().flat_map(|(keyword, value)| {
        let is_plain = PLAIN.contains(&keyword.as_str());
        let is_list = value.is_array();
        if NAMED.contains(&keyword.as_str()) {
            value.as_object_mut().into_iter().flat_map(Map::values_mut).collect()
        } else if is_plain && is_list {
            value.as_array_mut().into_iter().flatten().collect()
        } else {
            Vec::from_iter(is_plain.then_some(value))
        }
    })
}
