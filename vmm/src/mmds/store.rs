//! The document of metadata.

use serde_json::Value;

/// Why the document could not be changed or read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MmdsError {
    #[error("The MMDS data store is not initialized.")]
    NotInitialized,
    #[error("The MMDS patch request doesn't fit: {size} bytes exceed the limit of {limit}.")]
    TooLarge { size: usize, limit: usize },
    #[error("The MMDS resource does not exist.")]
    NotFound,
    #[error("Cannot retrieve value. The value has an unsupported type.")]
    UnsupportedType,
}

/// How a value is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Format {
    /// As JSON.
    Json,
    /// As EC2 writes it: a text as it is, an object as the list of its keys.
    Imds,
}

/// The document of metadata.
#[derive(Debug)]
pub(super) struct Store {
    document: Option<Value>,
    limit: usize,
}

impl Store {
    pub fn new(limit: usize) -> Self {
        Self { document: None, limit }
    }

    pub fn put(&mut self, document: Value) -> Result<(), MmdsError> {
        let (size, limit) = (document.to_string().len(), self.limit);
        if size > limit {
            return Err(MmdsError::TooLarge { size, limit });
        }
        self.document = Some(document);
        Ok(())
    }

    pub fn patch(&mut self, patch: &Value) -> Result<(), MmdsError> {
        let mut document = self.document.clone().ok_or(MmdsError::NotInitialized)?;
        merge(&mut document, patch);
        self.put(document)
    }

    pub fn json(&self) -> String {
        match &self.document {
            None | Some(Value::Null) => "{}".to_owned(),
            Some(document) => document.to_string(),
        }
    }

    /// The value at a path, which is a JSON pointer (RFC 6901), save that repeated slashes count as one
    /// and one at the end as none.
    pub fn get(&self, path: &str, format: Format) -> Result<String, MmdsError> {
        let mut pointer = String::with_capacity(path.len());
        for segment in path.split('/').filter(|segment| !segment.is_empty()) {
            pointer.push('/');
            pointer.push_str(segment);
        }
        let value = self.document.as_ref().and_then(|document| document.pointer(&pointer));
        let value = value.ok_or(MmdsError::NotFound)?;
        match (format, value) {
            (Format::Json, value) => Ok(value.to_string()),
            (Format::Imds, Value::String(text)) => Ok(text.clone()),
            (Format::Imds, Value::Object(object)) => {
                let line = |(key, value): (&String, &Value)| {
                    if value.is_object() { format!("{key}/") } else { key.clone() }
                };
                Ok(object.iter().map(line).collect::<Vec<_>>().join("\n"))
            }
            (Format::Imds, _) => Err(MmdsError::UnsupportedType),
        }
    }
}

/// A JSON merge patch (RFC 7396). Its depth is that of the patch, which the JSON reader limits.
fn merge(target: &mut Value, patch: &Value) {
    let Value::Object(patch) = patch else {
        *target = patch.clone();
        return;
    };
    if !target.is_object() {
        *target = Value::Object(serde_json::Map::new());
    }
    let Value::Object(target) = target else { return };
    for (key, value) in patch {
        if value.is_null() {
            target.remove(key);
        } else {
            merge(target.entry(key).or_insert(Value::Null), value);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn store() -> Store {
        let mut store = Store::new(200);
        store
            .put(json!({"latest": {"meta-data": {"ami-id": "ami-1", "n": 5, "tags": ["x"],
                "net": {"mac": "m"}}}, "a/b": "slash"}))
            .unwrap();
        store
    }

    #[test]
    fn merge_patch_as_in_the_examples_of_rfc_7396() {
        for (target, patch, result) in [
            (json!({"a":"b"}), json!({"a":"c"}), json!({"a":"c"})),
            (json!({"a":"b"}), json!({"b":"c"}), json!({"a":"b","b":"c"})),
            (json!({"a":"b"}), json!({"a":null}), json!({})),
            (json!({"a":"b","b":"c"}), json!({"a":null}), json!({"b":"c"})),
            (json!({"a":["b"]}), json!({"a":"c"}), json!({"a":"c"})),
            (json!({"a":"c"}), json!({"a":["b"]}), json!({"a":["b"]})),
            (json!({"a":{"b":"c"}}), json!({"a":{"b":"d","c":null}}), json!({"a":{"b":"d"}})),
            (json!({"a":[{"b":"c"}]}), json!({"a":[1]}), json!({"a":[1]})),
            (json!(["a", "b"]), json!(["c", "d"]), json!(["c", "d"])),
            (json!({"a":"b"}), json!(["c"]), json!(["c"])),
            (json!({"a":"foo"}), json!(null), json!(null)),
            (json!({"a":"foo"}), json!("bar"), json!("bar")),
            (json!({"e":null}), json!({"a":1}), json!({"e":null,"a":1})),
            (json!([1, 2]), json!({"a":"b","c":null}), json!({"a":"b"})),
            (json!({}), json!({"a":{"bb":{"ccc":null}}}), json!({"a":{"bb":{}}})),
        ] {
            let mut value = target.clone();
            merge(&mut value, &patch);
            assert_eq!(value, result, "{target} patched by {patch}");
        }
    }

    #[test]
    fn paths_and_formats() {
        let store = store();
        for (path, json, imds) in [
            ("/latest/meta-data/ami-id", r#""ami-1""#, Some("ami-1")),
            ("//latest///meta-data/ami-id/", r#""ami-1""#, Some("ami-1")),
            ("/latest/meta-data/net", r#"{"mac":"m"}"#, Some("mac")),
            ("/latest/meta-data/n", "5", None),
            ("/latest/meta-data/tags", r#"["x"]"#, None),
            ("/latest/meta-data/tags/0", r#""x""#, Some("x")),
            ("/a~1b", r#""slash""#, Some("slash")),
        ] {
            assert_eq!(store.get(path, Format::Json).unwrap(), json, "{path}");
            assert_eq!(store.get(path, Format::Imds).ok().as_deref(), imds, "{path}");
        }
        assert_eq!(store.get("/", Format::Imds).unwrap(), "a/b\nlatest/");
        assert_eq!(store.get("/latest/meta-data", Format::Imds).unwrap(), "ami-id\nn\nnet/\ntags");
        assert_eq!(store.get("/latest/meta-data/n", Format::Imds), Err(MmdsError::UnsupportedType));
        for path in ["/none", "/latest/meta-data/tags/1", "/latest/meta-data/ami-id/x"] {
            assert_eq!(store.get(path, Format::Json), Err(MmdsError::NotFound), "{path}");
        }
    }

    #[test]
    fn the_limit_holds_for_the_whole_document() {
        let mut empty = Store::new(16);
        assert_eq!(empty.json(), "{}");
        assert_eq!(empty.get("/", Format::Json), Err(MmdsError::NotFound));
        assert_eq!(empty.patch(&json!({})), Err(MmdsError::NotInitialized));
        empty.put(json!({"k":"12345678"})).unwrap();
        assert_eq!(empty.put(json!({"k":"123456789"})), Err(MmdsError::TooLarge { size: 17, limit: 16 }));
        assert!(matches!(empty.patch(&json!({"l":1})), Err(MmdsError::TooLarge { .. })));
        assert_eq!(empty.json(), r#"{"k":"12345678"}"#);
    }
}
