//! Calls as a JSON schema, so that a model that must call a function can do nothing else.

use serde_json::{Value, json};

use super::Tool;

/// A call of one of these tools: `{"name": .., "arguments": {..}}`.
pub fn choice_schema(tools: &[&Tool]) -> Value {
    let mut definitions = serde_json::Map::new();
    let calls: Vec<Value> = calls(tools, &mut definitions);
    json!({"anyOf": calls, "$defs": definitions})
}

/// An answer under a schema, or a call of one of these tools.
pub fn either_schema(answer: &Value, tools: &[&Tool]) -> Value {
    let mut definitions = serde_json::Map::new();
    let mut either = calls(tools, &mut definitions);
    either.push(hoisted("answer", answer, &mut definitions));
    json!({"anyOf": either, "$defs": definitions})
}

fn calls(tools: &[&Tool], definitions: &mut serde_json::Map<String, Value>) -> Vec<Value> {
    let calls = tools.iter().enumerate().map(|(index, tool)| {
        let arguments = hoisted(&format!("tool{index}"), &tool.parameters, definitions);
        json!({
            "type": "object",
            "properties": {"name": {"const": tool.name}, "arguments": arguments},
            "required": ["name", "arguments"],
            "additionalProperties": false,
        })
    });
    calls.collect()
}

/// Puts a schema among the definitions, its references with it; returns one to it.
fn hoisted(name: &str, schema: &Value, definitions: &mut serde_json::Map<String, Value>) -> Value {
    let place = format!("#/$defs/{name}");
    let mut schema = schema.clone();
    redirect(&mut schema, &place);
    definitions.insert(name.to_owned(), schema);
    json!({"$ref": place})
}

fn redirect(schema: &mut Value, place: &str) {
    match schema {
        Value::Object(map) => {
            for (name, value) in map {
                match value {
                    Value::String(target) if name == "$ref" => {
                        if let Some(rest) = target.strip_prefix('#') {
                            *target = format!("{place}{rest}");
                        }
                    }
                    other => redirect(other, place),
                }
            }
        }
        Value::Array(values) => values.iter_mut().for_each(|value| redirect(value, place)),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn references_still_point_where_they_did() {
        let parameters = json!({
            "type": "object",
            "properties": {"tree": {"$ref": "#/$defs/node"}, "self": {"$ref": "#"}},
            "$defs": {"node": {"type": "array", "items": {"$ref": "#/$defs/node"}}},
        });
        let tool = Tool { name: "f".into(), description: None, parameters };
        let schema = choice_schema(&[&tool]);
        let validator = jsonschema::validator_for(&schema).expect("it is a schema");
        let call = |tree: Value| json!({"name": "f", "arguments": {"tree": tree}});
        assert!(validator.is_valid(&call(json!([[], [[]]]))));
        assert!(!validator.is_valid(&call(json!([[3]]))));
        assert!(!validator.is_valid(&json!({"name": "g", "arguments": {}})));
        let either = either_schema(&json!({"type": "integer"}), &[&tool]);
        let validator = jsonschema::validator_for(&either).expect("it is a schema");
        assert!(validator.is_valid(&json!(3)) && validator.is_valid(&call(json!([]))));
        assert!(!validator.is_valid(&json!("x")));
    }
}
