//! What Hugging Face adds to Jinja for chat templates: `tojson` as Python writes it,
//! `raise_exception`, `strftime_now` and the `generation` block.
//!
//! Has no clock: the date comes in as text.

use minijinja::value::{Kwargs, Value, ValueKind};
use minijinja::{Error, ErrorKind};
use serde_json::Value as Json;
use std::fmt::Write;

/// `json.dumps` with `ensure_ascii=False`, keys in the order given.
pub(crate) fn tojson(value: &Value, options: Kwargs) -> Result<Value, Error> {
    let indent = match options.get::<Option<Value>>("indent")? {
        None => None,
        Some(indent) if indent.is_none() => None,
        Some(indent) => Some(match indent.as_str() {
            Some(text) => text.to_owned(),
            None => " ".repeat(usize::try_from(indent)?),
        }),
    };
    let (between, colon) = match options.get::<Option<Vec<String>>>("separators")?.as_deref() {
        Some([between, colon]) => (between.clone(), colon.clone()),
        Some(_) => return Err(invalid("tojson's separators are a pair")),
        None if indent.is_some() => (",".into(), ": ".into()),
        None => (", ".into(), ": ".into()),
    };
    let writer = PythonJson {
        indent,
        between,
        colon,
        ensure_ascii: options.get::<Option<bool>>("ensure_ascii")?.unwrap_or(false),
        sort_keys: options.get::<Option<bool>>("sort_keys")?.unwrap_or(false),
    };
    options.assert_all_used()?;
    let mut text = String::new();
    writer.value(value, 0, &mut text)?;
    Ok(Value::from_safe_string(text))
}

/// A template's value for a piece of JSON; the keys of an object keep their order.
pub(crate) fn from_json(json: &Json) -> Value {
    match json {
        Json::Null => Value::from(()),
        Json::Bool(flag) => Value::from(*flag),
        Json::Number(number) => match (number.as_i64(), number.as_u64()) {
            (Some(integer), _) => Value::from(integer),
            (None, Some(integer)) => Value::from(integer),
            (None, None) => Value::from(number.as_f64().unwrap_or(f64::NAN)),
        },
        Json::String(text) => Value::from(text.as_str()),
        Json::Array(items) => items.iter().map(from_json).collect(),
        Json::Object(map) => {
            Value::from_pairs(map.iter().map(|(key, item)| (key.as_str(), from_json(item))))
        }
    }
}

pub(crate) fn raise_exception(message: String) -> Result<Value, Error> {
    Err(invalid(message))
}

/// `strftime_now(format)` for a fixed date, `YYYY-MM-DD` with an optional ` HH:MM:SS`.
pub(crate) fn strftime_now(date: &str) -> Option<Value> {
    let now = Moment::parse(date)?;
    Some(Value::from_function(move |format: String| -> Result<String, Error> {
        now.format(&format)
    }))
}

/// `{% generation %}` marks what the assistant wrote, for training; it scopes variables and
/// prints nothing, as `{% with %}` does. Whitespace control in the tags stays as it is.
pub(crate) fn without_generation_blocks(source: &str) -> String {
    let mut result = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(start) = rest.find("{%") {
        let (before, tag) = rest.split_at(start + 2);
        result.push_str(before);
        let body = tag.trim_start_matches(['-', '+']).trim_start();
        let words = [("endgeneration", "endwith"), ("generation", "with")];
        let found = words.iter().find_map(|(word, replacement)| {
            let after = body.strip_prefix(word)?;
            let end = after.trim_start().trim_start_matches(['-', '+']);
            end.starts_with("%}").then_some((after, replacement))
        });
        rest = match found {
            None => tag,
            Some((after, replacement)) => {
                result.push_str(&tag[..tag.len() - body.len()]);
                result.push_str(replacement);
                after
            }
        };
    }
    result.push_str(rest);
    result
}

struct PythonJson {
    indent: Option<String>,
    between: String,
    colon: String,
    ensure_ascii: bool,
    sort_keys: bool,
}

impl PythonJson {
    fn value(&self, value: &Value, depth: usize, out: &mut String) -> Result<(), Error> {
        match value.kind() {
            ValueKind::None => out.push_str("null"),
            ValueKind::Bool => out.push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number if value.is_integer() => out.push_str(&value.to_string()),
            ValueKind::Number => python_float(f64::try_from(value.clone())?, out),
            ValueKind::String => self.string(&value.to_string(), out),
            ValueKind::Seq | ValueKind::Iterable => {
                let items: Vec<Value> = value.try_iter()?.collect();
                self.group(('[', ']'), &items, depth, out, |item, out| {
                    self.value(item, depth + 1, out)
                })?;
            }
            ValueKind::Map => {
                let mut keys: Vec<Value> = value.try_iter()?.collect();
                if self.sort_keys {
                    keys.sort_by_key(Value::to_string);
                }
                self.group(('{', '}'), &keys, depth, out, |key, out| {
                    self.string(&key.to_string(), out);
                    out.push_str(&self.colon);
                    self.value(&value.get_item(key)?, depth + 1, out)
                })?;
            }
            other => return Err(invalid(format!("tojson of a value that is {other}"))),
        }
        Ok(())
    }

    fn group(
        &self,
        brackets: (char, char),
        items: &[Value],
        depth: usize,
        out: &mut String,
        write: impl Fn(&Value, &mut String) -> Result<(), Error>,
    ) -> Result<(), Error> {
        out.push(brackets.0);
        for (index, item) in items.iter().enumerate() {
            if index > 0 {
                out.push_str(&self.between);
            }
            self.line(depth + 1, out);
            write(item, out)?;
        }
        if !items.is_empty() {
            self.line(depth, out);
        }
        out.push(brackets.1);
        Ok(())
    }

    fn line(&self, depth: usize, out: &mut String) {
        if let Some(indent) = &self.indent {
            out.push('\n');
            out.extend(std::iter::repeat_n(indent.as_str(), depth));
        }
    }

    fn string(&self, text: &str, out: &mut String) {
        let escape = |code: u16, out: &mut String| {
            write!(out, "\\u{code:04x}").expect("a String takes all text");
        };
        out.push('"');
        for letter in text.chars() {
            match letter {
                '"' => out.push_str("\\\""),
                '\\' => out.push_str("\\\\"),
                '\n' => out.push_str("\\n"),
                '\r' => out.push_str("\\r"),
                '\t' => out.push_str("\\t"),
                '\u{8}' => out.push_str("\\b"),
                '\u{c}' => out.push_str("\\f"),
                '\0'..='\x1f' => escape(letter as u16, out),
                '\x7f'.. if self.ensure_ascii => {
                    let mut units = [0; 2];
                    letter.encode_utf16(&mut units).iter().for_each(|&unit| escape(unit, out));
                }
                _ => out.push(letter),
            }
        }
        out.push('"');
    }
}

/// Python's `repr` of a float: the shortest digits, an exponent outside 1e-4 .. 1e16.
fn python_float(float: f64, out: &mut String) {
    let scientific = format!("{float:e}");
    let (digits, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    if (-4..16).contains(&exponent) {
        let plain = float.to_string();
        out.push_str(&plain);
        if !plain.contains('.') {
            out.push_str(".0");
        }
    } else {
        let sign = if exponent < 0 { '-' } else { '+' };
        write!(out, "{digits}e{sign}{:02}", exponent.abs()).expect("a String takes all text");
    }
}

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
const DAYS: [&str; 7] =
    ["Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"];

/// A date and a time of day, in whatever time zone the caller took them.
#[derive(Debug, Clone, Copy)]
struct Moment {
    year: u32,
    month: u32,
    day: u32,
    hour: u32,
    minute: u32,
    second: u32,
}

impl Moment {
    fn parse(text: &str) -> Option<Self> {
        let mut numbers = [0; 6];
        let mut fields = text.trim().split(['-', ' ', 'T', ':']);
        for (index, number) in numbers.iter_mut().enumerate() {
            match fields.next() {
                Some(field) => *number = field.parse().ok()?,
                None if index >= 3 => break,
                None => return None,
            }
        }
        let [year, month, day, hour, minute, second] = numbers;
        let sound = fields.next().is_none()
            && (1..=9999).contains(&year)
            && (1..=12).contains(&month)
            && (1..=31).contains(&day)
            && hour < 24
            && minute < 60
            && second < 62;
        sound.then_some(Self { year, month, day, hour, minute, second })
    }

    /// Sunday is 0 (Sakamoto's method).
    fn weekday(self) -> usize {
        const SHIFT: [u32; 12] = [0, 3, 2, 5, 0, 3, 5, 1, 4, 6, 2, 4];
        let year = self.year - u32::from(self.month < 3);
        let shift = SHIFT[self.month as usize - 1];
        ((year + year / 4 - year / 100 + year / 400 + shift + self.day) % 7) as usize
    }

    fn format(self, format: &str) -> Result<String, Error> {
        let mut text = String::new();
        let mut letters = format.chars();
        while let Some(letter) = letters.next() {
            if letter != '%' {
                text.push(letter);
                continue;
            }
            let mut code = letters.next();
            let padded = code != Some('-');
            if !padded {
                code = letters.next();
            }
            self.field(code.unwrap_or('%'), padded, &mut text)?;
        }
        Ok(text)
    }

    fn field(self, code: char, padded: bool, text: &mut String) -> Result<(), Error> {
        let month = MONTHS[self.month as usize - 1];
        let day = DAYS[self.weekday()];
        let number = match code {
            'Y' => return put(text, format_args!("{}", self.year)),
            'B' => return put(text, format_args!("{month}")),
            'b' | 'h' => return put(text, format_args!("{}", &month[..3])),
            'A' => return put(text, format_args!("{day}")),
            'a' => return put(text, format_args!("{}", &day[..3])),
            'p' => {
                let half = if self.hour < 12 { "AM" } else { "PM" };
                return put(text, format_args!("{half}"));
            }
            '%' => return put(text, format_args!("%")),
            'F' => {
                let (month, day) = (self.month, self.day);
                return put(text, format_args!("{}-{month:02}-{day:02}", self.year));
            }
            'm' => self.month,
            'd' => self.day,
            'y' => self.year % 100,
            'H' => self.hour,
            'I' => (self.hour + 11) % 12 + 1,
            'M' => self.minute,
            'S' => self.second,
            other => return Err(invalid(format!("strftime_now: %{other} is not supported"))),
        };
        match padded {
            true => put(text, format_args!("{number:02}")),
            false => put(text, format_args!("{number}")),
        }
    }
}

fn put(text: &mut String, piece: std::fmt::Arguments) -> Result<(), Error> {
    text.write_fmt(piece).map_err(|_| invalid("out of memory"))
}

fn invalid(message: impl Into<std::borrow::Cow<'static, str>>) -> Error {
    Error::new(ErrorKind::InvalidOperation, message)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chat_template::{ChatTemplate, Conversation};
    use expect_test::expect;
    use serde_json::json;
    use std::collections::BTreeMap;

    #[test]
    fn floats_read_as_in_python() {
        let cases = [
            (1.0, "1.0"),
            (0.1, "0.1"),
            (1e-5, "1e-05"),
            (1.5e-7, "1.5e-07"),
            (1e15, "1000000000000000.0"),
            (1e16, "1e+16"),
            (-2.5e22, "-2.5e+22"),
            (0.0001, "0.0001"),
        ];
        for (float, expected) in cases {
            let mut text = String::new();
            python_float(float, &mut text);
            assert_eq!(text, expected);
        }
    }

    #[test]
    fn dates_are_written_as_strftime_does() {
        let now = Moment::parse("2024-07-26 09:05:00").expect("a date");
        let text = now.format("%A %a %d %-d %b %B %y %Y %H:%M:%S %I %p %F %%");
        let expected = "Friday Fri 26 26 Jul July 24 2024 09:05:00 09 AM 2024-07-26 %";
        assert_eq!(text.expect("all known"), expected);
        assert!(Moment::parse("26 July").is_none());
        assert!(Moment::parse("2024-13-01").is_none());
        assert!(now.format("%Q").is_err());
    }

    #[test]
    fn generation_blocks_leave_no_trace() {
        let source = "a {%- generation -%} b {% generation_x %}{%+ endgeneration +%}";
        let expected = "a {%- with -%} b {% generation_x %}{%+ endwith +%}";
        assert_eq!(without_generation_blocks(source), expected);
    }

    fn render(source: &str, variables: Json) -> String {
        let template = ChatTemplate::new(source, &BTreeMap::new()).unwrap();
        let conversation = Conversation {
            extra: variables.as_object().unwrap().clone(),
            ..Conversation::default()
        };
        template.render(&conversation).unwrap_or_else(|error| error.to_string())
    }

    #[test]
    fn tojson_writes_what_python_writes() {
        let value =
            json!({"b": [1, 2.0, 1e-7, -3], "a": {"é": "\"<\u{1}\t\u{7f}😀"}, "c": [], "d": null});
        let x = json!({"x": value});
        expect![[
            r#"{"b": [1, 2.0, 1e-07, -3], "a": {"é": "\"<\u0001\t😀"}, "c": [], "d": null}"#
        ]]
        .assert_eq(&render("{{ x|tojson }}", x.clone()));
        expect![[r#"
            {
              "b": [
                1,
                2.0,
                1e-07,
                -3
              ],
              "a": {
                "é": "\"<\u0001\t😀"
              },
              "c": [],
              "d": null
            }"#]]
        .assert_eq(&render("{{ x|tojson(indent=2) }}", x.clone()));
        let source = "{{ x|tojson(separators=(',', ':'), sort_keys=true, ensure_ascii=true) }}";
        let compact = concat!(
            r#"{"a":{"\u00e9":"\"<\u0001\t\u007f\ud83d\ude00"},"#,
            r#""b":[1,2.0,1e-07,-3],"c":[],"d":null}"#
        );
        assert_eq!(render(source, x), compact);
        expect![
            "chat template: invalid operation: tojson of a value that is undefined (in default:1)"
        ]
        .assert_eq(&render("{{ nothing|tojson }}", json!({})));
    }

    #[test]
    fn values_print_as_in_python() {
        let variables =
            json!({"t": true, "n": null, "f": 1.0, "l": ["a", 1, false], "d": {"k": null}});
        let source = "{{ t }} {{ n }} {{ f }} {{ l }} {{ d }} {{ l|string ~ t }}";
        let expected = "True None 1.0 ['a', 1, False] {'k': None} ['a', 1, False]True";
        assert_eq!(render(source, variables), expected);
    }
}
