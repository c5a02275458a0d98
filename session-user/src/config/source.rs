//! The text of a configuration: values as they were typed, and errors that name their line.

use std::ops::{Range, RangeInclusive};

use toml::Spanned;

use super::{ConfigError, Peer, Result, raw};

/// A file's text, to tell lines from offsets.
pub(super) struct Source<'a> {
    pub(super) file: &'a str,
    pub(super) text: &'a str,
}

impl Source<'_> {
    /// The line on which something begins, from 1.
    pub(super) fn line(&self, span: &Range<usize>) -> usize {
        let upto = self.text.get(..span.start).unwrap_or(self.text);
        upto.bytes().filter(|b| *b == b'\n').count() + 1
    }

    pub(super) fn error(
        &self,
        span: &Range<usize>,
        key: &str,
        message: impl Into<String>,
    ) -> ConfigError {
        ConfigError {
            file: self.file.to_owned(),
            line: self.line(span),
            key: key.to_owned(),
            message: message.into(),
        }
    }

    /// Converts a value that was typed, or takes the default.
    pub(super) fn or<T>(
        &self,
        key: &str,
        typed: Option<&raw::Text>,
        default: T,
        parse: impl Fn(&str) -> std::result::Result<T, String>,
    ) -> Result<T> {
        typed.map_or(Ok(default), |text| self.one(key, text, parse))
    }

    pub(super) fn one<T>(
        &self,
        key: &str,
        text: &raw::Text,
        parse: impl Fn(&str) -> std::result::Result<T, String>,
    ) -> Result<T> {
        parse(text.get_ref()).map_err(|message| self.error(&text.span(), key, message))
    }

    /// The index of the peer that is named.
    pub(super) fn peer(&self, key: &str, text: &raw::Text, peers: &[Peer]) -> Result<usize> {
        self.one(key, text, |name| {
            let known = || {
                let names: Vec<&str> = peers.iter().map(|p| p.name.as_str()).collect();
                names.join(", ")
            };
            peers
                .iter()
                .position(|p| p.name == name)
                .ok_or_else(|| format!("`{name}` is no [[peer]]; there is: {}", known()))
        })
    }

    pub(super) fn all<T>(
        &self,
        key: &str,
        texts: &[raw::Text],
        parse: impl Fn(&str) -> std::result::Result<T, String>,
    ) -> Result<Vec<T>> {
        texts
            .iter()
            .map(|text| self.one(key, text, &parse))
            .collect()
    }

    pub(super) fn within(
        &self,
        key: &str,
        typed: Option<&Spanned<u64>>,
        default: u64,
        range: RangeInclusive<u64>,
    ) -> Result<u64> {
        let Some(value) = typed else {
            return Ok(default);
        };
        if range.contains(value.get_ref()) {
            return Ok(*value.get_ref());
        }
        let message = format!(
            "{} is out of range: expected {} to {}",
            value.get_ref(),
            range.start(),
            range.end()
        );
        Err(self.error(&value.span(), key, message))
    }
}
