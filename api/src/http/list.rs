//! Lists: what fits, a page at a time.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use super::error::Refusal;
use crate::model::{Group, Instance, LoadBalancer, Snapshot, Volume};

/// Most things on a page.
const PAGE: usize = 1000;

/// Things, and where to go on.
#[derive(Debug, Serialize, ToSchema)]
pub struct List<T> {
    pub items: Vec<Arc<T>>,
    /// There are more: ask again with `next_token` set to this.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub next_token: Option<String>,
}

impl<T> List<T> {
    /// All there are, on one page.
    pub fn all(items: Vec<Arc<T>>) -> Self {
        List { items, next_token: None }
    }
}

/// Declares the parameters of a list, which differ in what they say of the filter.
macro_rules! parameters {
    ($($(#[$about:meta])* $Name:ident: $(#[$filter:meta])*;)*) => {$(
        $(#[$about])*
        #[derive(Clone, Debug, Default, Deserialize, IntoParams)]
        #[serde(deny_unknown_fields)]
        #[into_params(parameter_in = Query)]
        pub struct $Name {
            $(#[$filter])*
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

        impl $Name {
            /// One page of things in order of their ids.
            ///
            /// # Errors
            ///
            /// The parameters cannot be understood.
            pub fn page<'a, T: Listed + 'a>(&self, all: impl Iterator<Item = &'a Arc<T>>) -> Result<List<T>, Refusal> {
                page(self.filter.as_deref(), self.max_results, self.next_token.as_deref(), all)
            }
        }
    )*};
}

parameters! {
    /// Which instances, and how many at a time.
    ListInstances:
        /// `NAME=VALUE,NAME=VALUE`: all must fit. Names are `id`, `state`, `image`, `type`, `network`, `key`, `group`,
        /// `address`, `hostname` and `tag:KEY`; `|` stands between several values, `*` for anything within one.
        ;
    /// Which volumes, and how many at a time.
    ListVolumes:
        /// `NAME=VALUE,NAME=VALUE`: all must fit. Names are `id`, `state`, `instance`, `snapshot` and `tag:KEY`; `|`
        /// stands between several values, `*` for anything within one.
        ;
    /// Which of things with names, and how many at a time.
    ListNamed:
        /// `NAME=VALUE,NAME=VALUE`: all must fit. Names are `id`, `name`, `state` and `tag:KEY`; `|` stands between
        /// several values, `*` for anything within one.
        ;
    /// Which snapshots, and how many at a time.
    ListSnapshots:
        /// `NAME=VALUE,NAME=VALUE`: all must fit. Names are `id`, `state`, `volume` and `tag:KEY`; `|` stands between
        /// several values, `*` for anything within one.
        ;
}

/// Something there can be many of.
pub trait Listed {
    /// What it can be looked for by, besides its tags.
    const NAMES: &'static [&'static str];

    fn id(&self) -> &str;

    fn tags(&self) -> &BTreeMap<String, String>;

    /// Whether a value it has under one of the names fits.
    fn has(&self, name: &str, fits: &dyn Fn(&str) -> bool) -> bool;
}

/// Says what a record with an id and tags can be looked for by: each name with whether `$fits` fits its value.
macro_rules! listed {
    ($Record:ty, |$item:ident, $fits:ident| { $($name:literal => $has:expr,)* }) => {
        impl Listed for $Record {
            const NAMES: &'static [&'static str] = &[$($name),*];

            fn id(&self) -> &str {
                &self.id
            }

            fn tags(&self) -> &BTreeMap<String, String> {
                &self.tags
            }

            fn has(&self, name: &str, $fits: &dyn Fn(&str) -> bool) -> bool {
                let $item = self;
                match name {
                    $($name => $has,)*
                    _ => false,
                }
            }
        }
    };
}

listed!(Instance, |it, fits| {
    "id" => fits(&it.id),
    "state" => fits(it.state.name()),
    "image" => fits(&it.image_id),
    "type" => fits(&it.instance_type),
    "network" => fits(&it.interface.network_id),
    "key" => it.key_name.as_deref().is_some_and(fits),
    "group" => it.security_groups.iter().any(|group| fits(group)),
    "address" => fits(&it.interface.private_address.to_string()),
    "hostname" => fits(&it.hostname),
});

listed!(Volume, |it, fits| {
    "id" => fits(&it.id),
    "state" => fits(it.state.name()),
    "instance" => it.attachment.as_ref().is_some_and(|attachment| fits(&attachment.instance_id)),
    "snapshot" => it.snapshot_id.as_deref().is_some_and(fits),
});

listed!(Snapshot, |it, fits| {
    "id" => fits(&it.id),
    "state" => fits(it.state.name()),
    "volume" => fits(&it.volume_id),
});

listed!(Group, |it, fits| {
    "id" => fits(&it.id),
    "name" => fits(&it.name),
    "state" => fits(it.state.name()),
});

listed!(LoadBalancer, |it, fits| {
    "id" => fits(&it.id),
    "name" => fits(&it.name),
    "state" => fits(it.state.name()),
});

/// A filter, understood.
#[derive(Debug, Default)]
pub struct Filter(BTreeMap<String, Vec<String>>);

fn invalid(message: String) -> Refusal {
    Refusal::new(axum::http::StatusCode::BAD_REQUEST, "InvalidParameterValue", message)
}

impl Filter {
    /// Understands `NAME=VALUE,…`.
    ///
    /// # Errors
    ///
    /// A name there is none of, or no `=`.
    pub fn parse<T: Listed>(text: &str) -> Result<Self, Refusal> {
        let mut filter = Filter::default();
        for part in text.split(',').filter(|part| !part.is_empty()) {
            let (name, values) = part.split_once('=').unwrap_or((part, ""));
            if !part.contains('=') || !(T::NAMES.contains(&name) || name.starts_with("tag:")) {
                let names = T::NAMES.join(", ");
                return Err(invalid(format!(
                    "filter: {part:?} is not NAME=VALUE; names are {names} and tag:KEY"
                )));
            }
            filter.0.insert(name.to_owned(), values.split('|').map(str::to_owned).collect());
        }
        Ok(filter)
    }

    pub fn fits<T: Listed>(&self, item: &T) -> bool {
        self.0.iter().all(|(name, patterns)| {
            let any = |value: &str| patterns.iter().any(|pattern| matches(pattern, value));
            match name.strip_prefix("tag:") {
                Some(key) => item.tags().get(key).is_some_and(|value| any(value)),
                None => item.has(name, &any),
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

fn page<'a, T: Listed + 'a>(
    filter: Option<&str>,
    max_results: Option<usize>,
    next_token: Option<&str>,
    all: impl Iterator<Item = &'a Arc<T>>,
) -> Result<List<T>, Refusal> {
    let limit = max_results.unwrap_or(PAGE);
    if !(1..=PAGE).contains(&limit) {
        return Err(invalid(format!("max_results: must be 1 to {PAGE}")));
    }
    let filter = Filter::parse::<T>(filter.unwrap_or_default())?;
    let after = next_token.unwrap_or_default();
    let mut fitting = all.filter(|item| item.id() > after && filter.fits(&***item));
    let items: Vec<_> = fitting.by_ref().take(limit).cloned().collect();
    let next_token = items.last().filter(|_| fitting.next().is_some()).map(|last| last.id().to_owned());
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
        assert!(Filter::parse::<Instance>("state=running|pending,tag:Name=web-*").is_ok());
        for bad in ["colour=red", "state", "=x"] {
            assert!(Filter::parse::<Instance>(bad).is_err(), "{bad}");
        }
        assert!(Filter::parse::<Volume>("hostname=x").is_err());
    }
}
