//! The HTTP API: what comes in is checked here and handed on, what comes out gets its form here. No decision
//! about instances is made in this module.
//!
//! A request passes, in this order: a bound on how many are under way (429 beyond it), an id for logs and
//! answers, a bound in time, [`auth`], its handler. Bodies are JSON, bounded, with no field unknown. Every
//! refusal has the form of [`error::ErrorBody`].

mod auth;
mod error;
mod extract;
mod instances;
mod list;
mod middleware;
mod resources;
mod tokens;

use std::sync::Arc;

use axum::Router;
use axum::extract::DefaultBodyLimit;
use tokio::sync::Semaphore;
use utoipa::OpenApi;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::instances::Service;

pub use auth::{Door, Role};
pub use list::List;

/// Longest body of a request, in bytes.
const BODY: usize = 256 * 1024;
/// Requests under way at once.
const UNDER_WAY: usize = 1024;

/// What the handlers work with.
pub struct Api {
    pub instances: Service,
    under_way: Arc<Semaphore>,
}

impl Api {
    pub fn new(instances: Service) -> Self {
        Api { instances, under_way: Arc::new(Semaphore::new(UNDER_WAY)) }
    }
}

/// The description of the API; routes add themselves.
#[derive(OpenApi)]
#[openapi(info(
    title = "Pulau",
    description = "Runs microVMs of this host as instances. Names, states and error codes are those of EC2 where it has them.",
    license(name = "Apache-2.0", identifier = "Apache-2.0")
))]
struct Description;

fn described() -> (Router<Arc<Api>>, utoipa::openapi::OpenApi) {
    OpenApiRouter::with_openapi(Description::openapi())
        .routes(routes!(instances::list, instances::run))
        .routes(routes!(instances::get, instances::modify, instances::terminate))
        .routes(routes!(instances::start))
        .routes(routes!(instances::stop))
        .routes(routes!(instances::reboot))
        .routes(routes!(instances::wait))
        .routes(routes!(instances::console))
        .routes(routes!(instances::metrics))
        .routes(routes!(instances::exec))
        .routes(routes!(instances::types))
        .routes(routes!(resources::images, resources::import_image))
        .routes(routes!(resources::image, resources::delete_image))
        .routes(routes!(resources::key_pairs, resources::create_key_pair))
        .routes(routes!(resources::delete_key_pair))
        .routes(routes!(resources::networks, resources::create_network))
        .routes(routes!(resources::delete_network))
        .routes(routes!(resources::security_groups, resources::create_security_group))
        .routes(routes!(resources::modify_rules, resources::delete_security_group))
        .routes(routes!(tokens::list, tokens::create))
        .routes(routes!(tokens::delete))
        .split_for_parts()
}

/// The OpenAPI 3.1 document.
pub fn openapi() -> utoipa::openapi::OpenApi {
    described().1
}

/// Everything that is served.
pub fn router(api: Arc<Api>) -> Router {
    let (routes, openapi) = described();
    let document = openapi.to_json().unwrap_or_default();
    let document =
        move || async move { ([(axum::http::header::CONTENT_TYPE, "application/json")], document) };
    routes
        .route("/openapi.json", axum::routing::get(document))
        .route("/healthz", axum::routing::get(|| async { "ok\n" }))
        .fallback(|| async {
            let message = "there is nothing at this path; /openapi.json lists what there is";
            error::Refusal::new(axum::http::StatusCode::NOT_FOUND, "InvalidAction", message)
        })
        .method_not_allowed_fallback(|| async {
            let message = "this method is not for this path; /openapi.json lists what there is";
            error::Refusal::new(axum::http::StatusCode::METHOD_NOT_ALLOWED, "InvalidMethod", message)
        })
        .layer(axum::middleware::from_fn_with_state(api.clone(), auth::authorize))
        .layer(axum::middleware::from_fn_with_state(api.clone(), middleware::frame))
        .layer(DefaultBodyLimit::max(BODY))
        .with_state(api)
}
