//! The web console: four files that are part of the program. They are nothing but a client of the API that runs in
//! a browser; it asks for a token, and keeps it as long as the tab.
//!
//! The content security policy lets the page run its own script and speak with its own daemon, and nothing else.

use axum::Router;
use axum::http::header::{
    CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE, REFERRER_POLICY, X_CONTENT_TYPE_OPTIONS,
};
use axum::response::{IntoResponse, Redirect};
use axum::routing::get;

const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; \
     base-uri 'none'; form-action 'none'; frame-ancestors 'none'";

/// Paths that need no token: there is nothing secret in them.
pub const PATHS: [&str; 5] = ["/", "/web/", "/web/web.js", "/web/web.css", "/web/icon.svg"];

/// The routes of [`PATHS`].
pub fn routes<S: Clone + Send + Sync + 'static>() -> Router<S> {
    Router::new()
        .route("/", get(|| async { Redirect::temporary("/web/") }))
        .route("/web/", get(|| async { file("text/html", include_str!("web/index.html")) }))
        .route("/web/web.js", get(|| async { file("text/javascript", include_str!("web/web.js")) }))
        .route("/web/web.css", get(|| async { file("text/css", include_str!("web/web.css")) }))
        .route("/web/icon.svg", get(|| async { file("image/svg+xml", include_str!("web/icon.svg")) }))
}

fn file(kind: &'static str, text: &'static str) -> impl IntoResponse {
    let kind = format!("{kind}; charset=utf-8");
    let headers = [
        (CONTENT_TYPE, kind.as_str()),
        (CONTENT_SECURITY_POLICY, POLICY),
        (X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (REFERRER_POLICY, "no-referrer"),
        (CACHE_CONTROL, "no-cache"),
    ];
    (headers.map(|(name, value)| (name, value.to_owned())), text)
}
