//! A command's words, with quotes and backslashes as a shell reads them.

/// Splits at blanks; `"a b"`, `'a b'` and `a\\ b` are one word.
pub fn split(text: &str) -> Vec<String> {
    let mut words = Vec::new();
    let mut word: Option<String> = None;
    let mut quote: Option<char> = None;
    let mut characters = text.chars();
    while let Some(character) = characters.next() {
        match (character, quote) {
            ('\\', None | Some('"')) => {
                let next = characters.next().unwrap_or('\\');
                word.get_or_insert_default().push(next);
            }
            (mark, Some(open)) if mark == open => quote = None,
            ('"' | '\'', None) => {
                quote = Some(character);
                word.get_or_insert_default();
            }
            (blank, None) if blank.is_whitespace() => words.extend(word.take()),
            (other, _) => word.get_or_insert_default().push(other),
        }
    }
    words.extend(word);
    words
}

#[cfg(test)]
mod tests {
    use super::split;

    #[test]
    fn quotes_and_backslashes_keep_blanks() {
        assert_eq!(split(" a  b "), ["a", "b"]);
        assert_eq!(split(r#""a b" 'c "d' e\ f "" x"y z""#), ["a b", "c \"d", "e f", "", "xy z"]);
        assert_eq!(split("größe 🙂.txt"), ["größe", "🙂.txt"]);
    }
}
