//! Parses the text of a manifest file.
//!
//! It reads no files, and other files do not matter. One invalid document makes the whole file
//! invalid.

use std::fmt;

use k8s_openapi::api::{
    core::v1::{Node, Service},
    discovery::v1::EndpointSlice,
    networking::v1::ServiceCIDR,
};
use serde::{
    Deserialize, Deserializer,
    de::{DeserializeSeed, IgnoredAny, MapAccess, SeqAccess, Visitor},
};

use lb_control::model::event::{Object, ObjectKind};

/// The format of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// One or more YAML documents.
    Yaml,
    /// One JSON value.
    Json,
}

/// An object and the line, from 1, on which its document begins.
#[derive(Clone, Debug, PartialEq)]
pub struct Located {
    /// The line.
    pub line: u64,
    /// The object.
    pub object: Object,
}

/// Why a text is not a manifest.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {message}")]
pub struct ParseError {
    /// The line of the file, from 1.
    pub line: u64,
    /// The path of the field, such as `spec.ports[0].port`; empty for a syntax error.
    pub field: String,
    /// What is wrong there, in one line.
    pub message: String,
}

/// Reads every object of a watched kind; documents of other kinds are skipped.
///
/// # Errors
/// [`ParseError`] for the first document that is invalid.
pub fn parse(text: &str, format: Format) -> Result<Vec<Located>, ParseError> {
    let mut found = Vec::new();
    match format {
        Format::Yaml => {
            for document in documents(text) {
                read_document(document, format, &mut found)?;
            }
        }
        Format::Json if text.trim().is_empty() => {}
        Format::Json => read_document(Document { line: 1, text }, format, &mut found)?,
    }
    Ok(found)
}

/// A document of a stream and the line on which it begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Document<'a> {
    line: u64,
    text: &'a str,
}

/// Splits a YAML stream by its lines. That is exact, because YAML forbids a line that begins
/// with a document marker inside any scalar.
fn documents(text: &str) -> Vec<Document<'_>> {
    let mut found = Vec::new();
    let mut start = 0;
    let mut start_line = 1;
    let mut offset = 0;
    for (line, content) in (1..).zip(text.split_inclusive('\n')) {
        if is_marker(content, "---") && offset > start {
            found.push(Document { line: start_line, text: &text[start..offset] });
            (start, start_line) = (offset, line);
        }
        offset += content.len();
        if is_marker(content, "...") {
            found.push(Document { line: start_line, text: &text[start..offset] });
            (start, start_line) = (offset, line + 1);
        }
    }
    found.push(Document { line: start_line, text: &text[start..] });
    found.retain(|document| document.has_content());
    found
}

fn is_marker(line: &str, marker: &str) -> bool {
    line.strip_prefix(marker)
        .is_some_and(|rest| rest.trim_start().is_empty() || rest.starts_with([' ', '\t']))
}

impl Document<'_> {
    fn has_content(&self) -> bool {
        !self.text.lines().all(is_blank)
    }

    /// The line, from 1, of the first content, after comments and markers.
    fn first_line(&self) -> u64 {
        self.line + self.text.lines().take_while(|line| is_blank(line)).count() as u64
    }
}

/// Whether a line has only a marker, a directive or a comment.
fn is_blank(line: &str) -> bool {
    let markers = ["---", "..."];
    let marker = markers.into_iter().find(|marker| is_marker(line, marker));
    let rest = marker.map_or(line, |marker| &line[marker.len()..]).trim();
    rest.is_empty() || rest.starts_with('#') || line.starts_with('%')
}

fn read_document(
    document: Document<'_>,
    format: Format,
    found: &mut Vec<Located>,
) -> Result<(), ParseError> {
    let line = document.first_line();
    let envelope = match (format, block_envelope(document.text)) {
        (Format::Yaml, Some(envelope)) => envelope,
        _ => with_seed(document, format, EnvelopeSeed)?,
    };
    match envelope.what(line)? {
        What::Object(kind) => {
            let object = with_seed(document, format, ObjectSeed(kind))?;
            found.push(named(object, line, "")?);
        }
        What::List(kinds) => {
            let objects = with_seed(document, format, ListSeed(&kinds))?;
            for (index, object) in objects {
                found.push(named(object, line, &format!("items[{index}]."))?);
            }
        }
        What::Other => {
            let kind = envelope.kind.unwrap_or_default();
            tracing::debug!(line, kind, "document of a kind that is not watched");
        }
    }
    Ok(())
}

/// Requires a name, and puts an object without a namespace into `default`.
fn named(mut object: Object, line: u64, prefix: &str) -> Result<Located, ParseError> {
    let namespaced = object.kind().is_namespaced();
    let metadata = object.metadata_mut();
    if metadata.name.as_deref().unwrap_or_default().is_empty() {
        let field = format!("{prefix}metadata.name");
        return Err(ParseError { line, field, message: "missing".to_owned() });
    }
    match (namespaced, metadata.namespace.as_deref()) {
        (false, _) => metadata.namespace = None,
        (true, None | Some("")) => metadata.namespace = Some("default".to_owned()),
        (true, Some(_)) => {}
    }
    Ok(Located { line, object })
}

/// The fields that name the type of a document.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Envelope {
    api_version: Option<String>,
    kind: Option<String>,
    items: Option<Vec<Self>>,
}

/// The type of a document.
enum What {
    Object(ObjectKind),
    /// The kind of each item; none for a kind that is not watched.
    List(Vec<Option<ObjectKind>>),
    Other,
}

impl Envelope {
    fn what(&self, line: u64) -> Result<What, ParseError> {
        let missing = |field: &str| ParseError {
            line,
            field: field.to_owned(),
            message: "missing".to_owned(),
        };
        let kind = self.kind.as_deref().ok_or_else(|| missing("kind"))?;
        let version = self.api_version.as_deref().ok_or_else(|| missing("apiVersion"))?;
        if let Some(kind) = known_kind(version, kind) {
            if version != kind.api_version() {
                let field = "apiVersion".to_owned();
                let message = format!("{version:?} is not {:?}", kind.api_version());
                return Err(ParseError { line, field, message });
            }
            return Ok(What::Object(kind));
        }
        let Some(item) = kind.strip_suffix("List") else { return Ok(What::Other) };
        if !item.is_empty() && known_kind(version, item).is_none() {
            return Ok(What::Other);
        }
        let of_item = |envelope: &Self| match &envelope.kind {
            Some(kind) => known_kind(envelope.api_version.as_deref().unwrap_or(version), kind),
            None => known_kind(version, item),
        };
        Ok(What::List(self.items.iter().flatten().map(of_item).collect()))
    }
}

/// The kind with this name in the API group of `version`, in any version of the group.
fn known_kind(version: &str, kind: &str) -> Option<ObjectKind> {
    let group = |version: &str| version.rsplit_once('/').map(|(group, _)| group.to_owned());
    ObjectKind::ALL
        .into_iter()
        .find(|known| known.name() == kind && group(known.api_version()) == group(version))
}

/// Reads the type of a document in block style, other than a list, from its lines, to
/// parse the document only once.
fn block_envelope(text: &str) -> Option<Envelope> {
    let mut envelope = Envelope::default();
    for line in text.lines() {
        let field = match line.split_once(':') {
            Some(("kind", value)) => (&mut envelope.kind, value),
            Some(("apiVersion", value)) => (&mut envelope.api_version, value),
            _ => continue,
        };
        let value = field.1.split(" #").next().unwrap_or_default().trim();
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"./-".contains(&byte);
        if value.is_empty() || !value.bytes().all(plain) || field.0.is_some() {
            return None;
        }
        *field.0 = Some(value.to_owned());
    }
    let kind = envelope.kind.as_deref()?;
    (envelope.api_version.is_some() && !kind.ends_with("List")).then_some(envelope)
}

/// Deserialises a document, with the path of the field in errors.
fn with_seed<'a, S>(document: Document<'a>, format: Format, seed: S) -> Result<S::Value, ParseError>
where
    S: DeserializeSeed<'a>,
{
    let mut track = serde_path_to_error::Track::new();
    let (line, message) = match format {
        Format::Json => {
            let mut source = serde_json::Deserializer::from_str(document.text);
            let result = seed
                .deserialize(serde_path_to_error::Deserializer::new(&mut source, &mut track))
                .and_then(|value| source.end().map(|()| value));
            match result {
                Ok(value) => return Ok(value),
                Err(error) => (error.line() as u64, error.to_string()),
            }
        }
        Format::Yaml => {
            let options = yaml_options();
            let result = serde_saphyr::with_deserializer_from_str_with_options(
                document.text,
                options,
                |source| {
                    seed.deserialize(serde_path_to_error::Deserializer::new(source, &mut track))
                },
            );
            match result {
                Ok(value) => return Ok(value),
                Err(error) => {
                    let line = error.location().map_or(1, |location| location.line());
                    let message = error.without_snippet().to_string();
                    (line, with_value(&message, &error, document.text))
                }
            }
        }
    };
    let line = document.line + line.max(1) - 1;
    let path = track.path().to_string();
    let field = path.trim_end_matches('?').trim_end_matches('.').to_owned();
    Err(ParseError { line, field, message: without_position(&message) })
}

/// No limits on size, because the files are the administrator's own, and a list of all endpoints
/// of a large cluster is one document.
fn yaml_options() -> serde_saphyr::Options {
    serde_saphyr::options! { budget: None, with_snippet: false }
}

/// Adds the value to a message that says only which type was expected.
fn with_value(message: &str, error: &serde_saphyr::Error, text: &str) -> String {
    let message = without_position(message);
    let span = error.location().map(|location| location.span());
    let Some(start) = span.and_then(|span| span.byte_offset()) else { return message };
    let rest = text.get(start as usize..).unwrap_or_default();
    let value = rest.lines().next().unwrap_or_default().trim();
    if value.is_empty() || message.contains(value) {
        return message;
    }
    format!("{message}: found {value}")
}

/// The first line of a message, without its position, which counts from the start of the
/// document and not of the file.
fn without_position(message: &str) -> String {
    let line = message.lines().next().unwrap_or_default();
    line.split(" at line ").next().unwrap_or_default().to_owned()
}

struct EnvelopeSeed;

impl<'de> DeserializeSeed<'de> for EnvelopeSeed {
    type Value = Envelope;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Envelope, D::Error> {
        Envelope::deserialize(deserializer)
    }
}

#[derive(Clone, Copy)]
struct ObjectSeed(ObjectKind);

impl<'de> DeserializeSeed<'de> for ObjectSeed {
    type Value = Object;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Object, D::Error> {
        match self.0 {
            ObjectKind::Service => Service::deserialize(deserializer).map(Object::from),
            ObjectKind::EndpointSlice => EndpointSlice::deserialize(deserializer).map(Object::from),
            ObjectKind::Node => Node::deserialize(deserializer).map(Object::from),
            ObjectKind::ServiceCidr => ServiceCIDR::deserialize(deserializer).map(Object::from),
        }
    }
}

/// The items of a list with their indices, given the kinds that were found before.
struct ListSeed<'k>(&'k [Option<ObjectKind>]);

impl<'de> DeserializeSeed<'de> for ListSeed<'_> {
    type Value = Vec<(usize, Object)>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for ListSeed<'_> {
    type Value = Vec<(usize, Object)>;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("a list of objects")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut found = Vec::new();
        while let Some(key) = map.next_key::<String>()? {
            if key == "items" {
                found = map.next_value_seed(ItemsSeed(self.0))?;
            } else {
                map.next_value::<IgnoredAny>()?;
            }
        }
        Ok(found)
    }
}

struct ItemsSeed<'k>(&'k [Option<ObjectKind>]);

impl<'de> DeserializeSeed<'de> for ItemsSeed<'_> {
    type Value = Vec<(usize, Object)>;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Self::Value, D::Error> {
        deserializer.deserialize_seq(self)
    }
}

impl<'de> Visitor<'de> for ItemsSeed<'_> {
    type Value = Vec<(usize, Object)>;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("a list")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Self::Value, A::Error> {
        let mut found = Vec::new();
        for (index, kind) in self.0.iter().enumerate() {
            match kind {
                Some(kind) => match items.next_element_seed(ObjectSeed(*kind))? {
                    Some(object) => found.push((index, object)),
                    None => break,
                },
                None if items.next_element::<IgnoredAny>()?.is_none() => break,
                None => {}
            }
        }
        while items.next_element::<IgnoredAny>()?.is_some() {}
        Ok(found)
    }
}

#[cfg(test)]
mod tests;
