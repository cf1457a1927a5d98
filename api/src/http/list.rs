//! Lists: what fits, a page at a time.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use super::error::Refusal;
use crate::model::Instance;

/// Most things on a page.
const PAGE: usize = 1000;

/// Things, and where to go on.
#[derive(Debug, Serialize, ToSchema)]
pub struct List<T> {
    pub items: Vec<std::sync::Arc<T>>,
    /// There are more: ask again with `next_token` set to this.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub next_token: Option<String>,
}

impl<T> List<T> {
    /// All there are, on one page.
    pub fn all(items: Vec<std::sync::Arc<T>>) -> Self {
        List { items, next_token: None }
    }
}

/// Which instances, and how many at a time.
#[derive(Clone, Debug, Default, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct ListInstances {
    /// `NAME=VALUE,NAME=VALUE`: all must fit. Names are `id`, `state`, `image`, `type`, `network`, `key`, `group`,
    /// `address`, `hostname` and `tag:KEY`; `|` stands between several values, `*` for anything within one.
    #[serde(default)]
    pub filter: Option<String>,
    /// 1 to 1000; 1000 if absent.
    #[serde(default)]
    #[param(minimum = 1, maximum = 1000)]
    pub max_results: Option<usize>,
    /// From the page before.
    #[serde(default)]
    pub next_token: Option<String>,
}

/// A filter, understood.
#[derive(Debug, Default)]
pub struct Filter(BTreeMap<String, Vec<String>>);

const NAMES: [&str; 9] = ["id", "state", "image", "type", "network", "key", "group", "address", "hostname"];

impl Filter {
    /// Understands `NAME=VALUE,…`.
    ///
    /// # Errors
    ///
    /// A name there is none of, or no `=`.
    pub fn parse(text: &str) -> Result<Self, Refusal> {
        let mut filter = Filter::default();
        for part in text.split(',').filter(|part| !part.is_empty()) {
            let (name, values) = part.split_once('=').unwrap_or((part, ""));
            if !part.contains('=') || !(NAMES.contains(&name) || name.starts_with("tag:")) {
                let message =
                    format!("filter: {part:?} is not NAME=VALUE; names are {} and tag:KEY", NAMES.join(", "));
                return Err(Refusal::new(
                    axum::http::StatusCode::BAD_REQUEST,
                    "InvalidParameterValue",
                    message,
                ));
            }
            filter.0.insert(name.to_owned(), values.split('|').map(str::to_owned).collect());
        }
        Ok(filter)
    }

    pub fn fits(&self, instance: &Instance) -> bool {
        self.0.iter().all(|(name, patterns)| {
            let any = |value: &str| patterns.iter().any(|pattern| matches(pattern, value));
            match name.as_str() {
                "id" => any(&instance.id),
                "state" => any(instance.state.name()),
                "image" => any(&instance.image_id),
                "type" => any(&instance.instance_type),
                "network" => any(&instance.interface.network_id),
                "key" => instance.key_name.as_deref().is_some_and(any),
                "group" => instance.security_groups.iter().any(|group| any(group)),
                "address" => any(&instance.interface.private_address.to_string()),
                "hostname" => any(&instance.hostname),
                tag => {
                    let key = tag.strip_prefix("tag:").unwrap_or(tag);
                    instance.tags.get(key).is_some_and(|value| any(value))
                }
            }
        })
    }
}

/// Whether `value` fits `pattern`, in which `*` stands for anything.
fn matches(pattern: &str, value: &str) -> bool {
    let mut parts = pattern.split('*');
    let Some(mut rest) = parts.next().and_then(|first| value.strip_prefix(first)) else { return false };
    let Some(last) = parts.next_back() else { return rest.is_empty() };
    for part in parts {
        let Some(at) = rest.find(part) else { return false };
        rest = &rest[at + part.len()..];
    }
    rest.ends_with(last)
}

/// One page of instances in order of their ids.
///
/// # Errors
///
/// The parameters cannot be understood.
pub fn page<'a>(
    query: &ListInstances,
    all: impl Iterator<Item = &'a std::sync::Arc<Instance>>,
) -> Result<List<Instance>, Refusal> {
    let limit = query.max_results.unwrap_or(PAGE);
    if !(1..=PAGE).contains(&limit) {
        let message = format!("max_results: must be 1 to {PAGE}");
        return Err(Refusal::new(axum::http::StatusCode::BAD_REQUEST, "InvalidParameterValue", message));
    }
    let filter = Filter::parse(query.filter.as_deref().unwrap_or_default())?;
    let after = query.next_token.as_deref().unwrap_or_default();
    let mut fitting = all.filter(|instance| instance.id.as_str() > after && filter.fits(instance));
    let items: Vec<_> = fitting.by_ref().take(limit).cloned().collect();
    let next_token = items.last().filter(|_| fitting.next().is_some()).map(|last| last.id.clone());
    Ok(List { items, next_token })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stars_stand_for_anything() {
        for (pattern, value) in
            [("a", "a"), ("*", ""), ("a*", "abc"), ("*c", "abc"), ("a*c*e", "abcde"), ("", "")]
        {
            assert!(matches(pattern, value), "{pattern} {value}");
        }
        for (pattern, value) in [("a", "ab"), ("a*b", "a"), ("a*a", "a"), ("*b*", "aca"), ("", "a")] {
            assert!(!matches(pattern, value), "{pattern} {value}");
        }
    }

    #[test]
    fn filters_are_checked() {
        assert!(Filter::parse("state=running|pending,tag:Name=web-*").is_ok());
        for bad in ["colour=red", "state", "=x"] {
            assert!(Filter::parse(bad).is_err(), "{bad}");
        }
    }
}
