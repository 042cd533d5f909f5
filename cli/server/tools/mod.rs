//! Functions that the model may call: what a client offers, and which it has to use.

mod grammar;
mod reader;

use serde_json::{Value, json};

use super::error::ApiError;
use super::lenient::{Fields, wrong_type};
pub use grammar::{choice_schema, either_schema};
use reader::{CLOSE, OPEN};
pub use reader::{Said, Speech, Style};

/// What may be called, checked.
#[derive(Debug, Clone, Default)]
pub struct Tools {
    pub list: Vec<Tool>,
    pub choice: Choice,
    /// More than one call in an answer.
    pub parallel: bool,
}

#[derive(Debug, Clone, PartialEq)]
pub struct Tool {
    pub name: String,
    pub description: Option<String>,
    /// A JSON schema of the arguments.
    pub parameters: Value,
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Choice {
    None,
    #[default]
    Auto,
    /// One of them, whichever.
    Required,
    Named(String),
}

const TOOLS: usize = 128;
const NAME_LEN: usize = 64;

impl Tools {
    /// Reads `tools`, `tool_choice` and `parallel_tool_calls`, in either API's shape.
    pub fn read(fields: &mut Fields) -> Result<Self, ApiError> {
        let values = fields.list("tools")?;
        if values.as_ref().is_some_and(|values| values.is_empty() || values.len() > TOOLS) {
            let message = format!("tools must have 1 to {TOOLS} entries");
            return Err(ApiError::invalid("tools", message));
        }
        let values = values.unwrap_or_default().into_iter().enumerate();
        let list = values.map(|(index, value)| Tool::read(&format!("tools[{index}]"), value));
        let mut tools = Self {
            list: list.collect::<Result<_, _>>()?,
            choice: Choice::Auto,
            parallel: fields.flag("parallel_tool_calls")?.unwrap_or(true),
        };
        if let Some(choice) = fields.value("tool_choice") {
            tools.choose(choice)?;
        }
        Ok(tools)
    }

    fn choose(&mut self, value: Value) -> Result<(), ApiError> {
        let refused = |message: String| Err(ApiError::invalid("tool_choice", message));
        self.choice = match &value {
            Value::String(mode) => mode_of(mode)?,
            Value::Object(_) => {
                let mut fields = Fields::of_value("tool_choice", value)?;
                match fields.required_text("type")?.as_str() {
                    "function" => {
                        let mut inner = fields.object("function")?;
                        Choice::Named(inner.as_mut().unwrap_or(&mut fields).required_text("name")?)
                    }
                    "allowed_tools" => self.allow(fields)?,
                    other => return refused(format!("tool_choice.type is {other:?}")),
                }
            }
            other => return Err(wrong_type("tool_choice", "a string or an object", other)),
        };
        match &self.choice {
            Choice::Named(name) if !self.list.iter().any(|tool| tool.name == *name) => {
                refused(format!("tool_choice names {name:?}, which is not among tools"))
            }
            Choice::Required if self.list.is_empty() => {
                refused("tool_choice is \"required\" and there are no tools".to_owned())
            }
            _ => Ok(()),
        }
    }

    /// `allowed_tools`: some of the tools, under a mode.
    fn allow(&mut self, mut fields: Fields) -> Result<Choice, ApiError> {
        // chat completions nest what responses have flat
        let mut fields = fields.object("allowed_tools")?.unwrap_or(fields);
        let names = fields.list("tools")?.unwrap_or_default().into_iter().map(|value| {
            let mut tool = Fields::of_value("tool_choice.tools", value)?;
            let mut inner = tool.object("function")?;
            inner.as_mut().unwrap_or(&mut tool).required_text("name")
        });
        let names: Vec<String> = names.collect::<Result<_, _>>()?;
        self.list.retain(|tool| names.contains(&tool.name));
        mode_of(&fields.text("mode")?.unwrap_or_else(|| "auto".to_owned()))
    }

    /// What the model is told of.
    pub fn offered(&self) -> Option<Value> {
        let offered = !self.list.is_empty() && self.choice != Choice::None;
        offered.then(|| self.list.iter().map(Tool::to_json).collect())
    }

    /// How an answer that may call them is read.
    pub fn speech(&self, style: Style) -> Speech {
        if self.offered().is_none() {
            return Speech::plain();
        }
        let names = self.list.iter().map(|tool| tool.name.clone()).collect();
        Speech::new(Some(style), names, self.parallel)
    }

    /// Those that must be called, where one must.
    pub fn forced(&self) -> Option<Vec<&Tool>> {
        match &self.choice {
            Choice::Required => Some(self.list.iter().collect()),
            Choice::Named(name) => {
                Some(self.list.iter().filter(|tool| tool.name == *name).collect())
            }
            Choice::None | Choice::Auto => None,
        }
    }
}

fn mode_of(text: &str) -> Result<Choice, ApiError> {
    match text {
        "none" => Ok(Choice::None),
        "auto" => Ok(Choice::Auto),
        "required" => Ok(Choice::Required),
        other => {
            let expected = "it must be none, auto, required or name a function";
            Err(ApiError::invalid("tool_choice", format!("tool_choice is {other:?}, {expected}")))
        }
    }
}

impl Tool {
    fn read(path: &str, value: Value) -> Result<Self, ApiError> {
        let mut fields = Fields::of_value(path, value)?;
        let kind = fields.required_text("type")?;
        if kind != "function" {
            let message = format!("{path}.type is {kind:?}; functions alone can be called");
            return Err(ApiError::invalid(format!("{path}.type"), message));
        }
        // chat completions nest what responses have flat
        let mut function = match fields.object("function")? {
            Some(inner) => inner,
            None if fields.has("name") => fields,
            None => return Err(fields.missing("function")),
        };
        let name = function.required_text("name")?;
        let letters = |letter: char| letter.is_ascii_alphanumeric() || "_-.".contains(letter);
        if name.is_empty() || name.len() > NAME_LEN || !name.chars().all(letters) {
            let path = function.path("name");
            let expected = format!("1 to {NAME_LEN} letters, digits, _, - or .");
            return Err(ApiError::invalid(&path, format!("{path} is {name:?}, not {expected}")));
        }
        let description = function.text("description")?;
        let parameters = match function.value("parameters") {
            None => json!({"type": "object", "properties": {}}),
            Some(schema @ Value::Object(_)) => schema,
            Some(other) => {
                return Err(wrong_type(&function.path("parameters"), "a JSON schema", &other));
            }
        };
        Ok(Self { name, description, parameters })
    }

    /// As templates take it.
    pub fn to_json(&self) -> Value {
        json!({"type": "function", "function": {
            "name": self.name,
            "description": self.description,
            "parameters": self.parameters,
        }})
    }
}

/// What a model is told whose template doesn't speak of tools.
fn described(tools: &Value) -> String {
    let list = tools.as_array().into_iter().flatten();
    let lines: Vec<String> = list.map(|tool| tool["function"].to_string()).collect();
    format!(
        "You can call these functions:\n{}\nTo call one, answer with \
         <tool_call>{{\"name\": ..., \"arguments\": {{...}}}}</tool_call>.",
        lines.join("\n")
    )
}

/// A system text with what such a model is told behind it.
pub fn told(system: Option<&str>, tools: &Value) -> String {
    let told = described(tools);
    system.map_or(told.clone(), |system| format!("{system}\n\n{told}"))
}

/// Calls as a model of this style says them.
pub fn spelt(calls: &Value, style: Style) -> String {
    let calls = calls.as_array().map_or(std::slice::from_ref(calls), Vec::as_slice);
    let functions = calls.iter().map(|call| &call["function"]);
    let one = |function: &Value| match style {
        Style::Tagged => format!("{OPEN}{function}{CLOSE}"),
        Style::Object => function.to_string(),
    };
    functions.map(one).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(body: Value) -> Result<Tools, ApiError> {
        Tools::read(&mut Fields::of_body(body.to_string().as_bytes()).unwrap())
    }

    #[test]
    fn both_shapes_of_a_tool_are_one() {
        let parameters = json!({"type": "object", "properties": {"a": {"type": "integer"}}});
        let nested = json!({"tools": [{"type": "function", "function":
            {"name": "f", "parameters": parameters}}],
            "tool_choice": {"type": "function", "function": {"name": "f"}}});
        let flat = json!({"tools": [{"type": "function", "name": "f", "parameters": parameters}],
            "tool_choice": {"type": "function", "name": "f"}});
        let (nested, flat) = (read(nested).unwrap(), read(flat).unwrap());
        assert_eq!((&nested.list, &nested.choice), (&flat.list, &flat.choice));
        assert_eq!(nested.choice, Choice::Named("f".into()));
        assert_eq!(nested.forced().unwrap().len(), 1);
    }

    #[test]
    fn what_is_no_tool_is_refused_by_name() {
        let function =
            |function: Value| json!({"tools": [{"type": "function", "function": function}]});
        let good = json!([{"type": "function", "function": {"name": "f"}}]);
        for (param, body) in [
            ("tools", json!({"tools": []})),
            ("tools", json!({"tools": {}})),
            ("tools[0]", json!({"tools": ["f"]})),
            ("tools[0].type", json!({"tools": [{}]})),
            ("tools[0].type", json!({"tools": [{"type": "web_search"}]})),
            ("tools[0].function", json!({"tools": [{"type": "function"}]})),
            ("tools[0].function.name", function(json!({}))),
            ("tools[0].function.name", function(json!({"name": "a b"}))),
            ("tools[0].function.name", function(json!({"name": "x".repeat(65)}))),
            ("tools[0].function.parameters", function(json!({"name": "f", "parameters": 3}))),
            ("tool_choice", json!({"tools": good, "tool_choice": "always"})),
            ("tool_choice", json!({"tools": good, "tool_choice": 3})),
            ("tool_choice", json!({"tool_choice": "required"})),
            (
                "tool_choice",
                json!({"tools": good, "tool_choice":
                {"type": "function", "function": {"name": "g"}}}),
            ),
            ("parallel_tool_calls", json!({"tools": good, "parallel_tool_calls": "x"})),
        ] {
            let error = read(body.clone()).err().unwrap_or_else(|| panic!("{body} is taken"));
            assert_eq!(error.param.as_deref(), Some(param), "{body}");
        }
    }

    #[test]
    fn allowed_tools_narrow_the_list() {
        let tool = |name: &str| json!({"type": "function", "function": {"name": name}});
        let allowed = json!({"type": "allowed_tools", "allowed_tools":
            {"mode": "required", "tools": [tool("b")]}});
        let tools = read(json!({"tools": [tool("a"), tool("b")], "tool_choice": allowed})).unwrap();
        assert_eq!(tools.choice, Choice::Required);
        assert_eq!(tools.forced().unwrap()[0].name, "b");
        assert_eq!(tools.offered().unwrap().as_array().unwrap().len(), 1);
    }
}
