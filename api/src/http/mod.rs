//! The HTTP API: what comes in is checked here and handed on, what comes out gets its form here. No decision
//! about instances is made in this module.
//!
//! A request passes, in this order: a bound on how many are under way (429 beyond it), an id for logs and
//! answers, a bound in time, [`auth`], its handler. Bodies are JSON, bounded, with no field unknown. Every
//! refusal has the form of [`error::ErrorBody`].

mod audit;
mod auth;
mod error;
mod events;
mod extract;
mod follow;
mod groups;
mod host;
mod images;
mod instances;
mod list;
mod load_balancers;
mod metrics;
mod middleware;
mod patches;
mod resources;
mod snapshots;
mod tokens;
mod tunnel;
mod volumes;
mod web;

use std::sync::{Arc, Weak};

use axum::Router;
use axum::extract::DefaultBodyLimit;
use axum::http::StatusCode;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, broadcast};
use utoipa::OpenApi;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::balancer::Balancers;
use crate::groups::Groups;
use crate::instances::Service;
use crate::records::{AnyRecord, RecordChange};
use audit::Audit;
use events::Events;
use metrics::Metrics;

pub use auth::{Door, Role};
pub use list::List;
pub use tunnel::{AGENT, CONSOLE};

/// Longest body of a request, in bytes.
const BODY: usize = 256 * 1024;
/// Requests under way at once.
const UNDER_WAY: usize = 1024;

/// Connections at once that stay: event streams, and those to guests.
const LONG_LIVED: usize = 256;

/// What the handlers work with.
pub struct Api {
    pub instances: Service,
    pub groups: Groups,
    pub balancers: Balancers,
    events: Events,
    metrics: Metrics,
    audit: Audit,
    under_way: Arc<Semaphore>,
    long_lived: Arc<Semaphore>,
}

impl Api {
    /// Follows the changes of records from now on.
    pub fn new(instances: Service, groups: Groups, balancers: Balancers) -> Arc<Self> {
        let records = &instances.host().records;
        // In this order: what changes in between is seen by the one who follows.
        let changes = records.subscribe();
        let events = Events::new(records.revision());
        let api = Arc::new(Api {
            events,
            metrics: Metrics::new(),
            audit: Audit::new(instances.host().logs.join("audit.jsonl")),
            under_way: Arc::new(Semaphore::new(UNDER_WAY)),
            long_lived: Arc::new(Semaphore::new(LONG_LIVED)),
            instances,
            groups,
            balancers,
        });
        tokio::spawn(follow(Arc::downgrade(&api), changes));
        api
    }

    /// Ends event streams, which would go on for ever.
    pub fn end_streams(&self) {
        self.events.close();
    }

    /// Room for one more connection that stays, taken until it is dropped.
    fn long_lived(&self) -> Result<OwnedSemaphorePermit, error::Refusal> {
        self.long_lived.clone().try_acquire_owned().map_err(|_| {
            let message = "too many connections to guests and event streams are open: close some";
            error::Refusal::new(StatusCode::TOO_MANY_REQUESTS, "RequestLimitExceeded", message)
        })
    }
}

/// Takes in changes of records, as long as there is somebody to tell.
async fn follow(api: Weak<Api>, mut changes: broadcast::Receiver<RecordChange>) {
    loop {
        let change = changes.recv().await;
        let Some(api) = api.upgrade() else { return };
        match change {
            Ok(change) => {
                if let AnyRecord::Instance { old, new: Some(new) } = &change.record {
                    let had = old.as_ref().and_then(|old| old.boot).and_then(|boot| boot.agent_us);
                    let booted = new.boot.filter(|boot| boot.agent_us.is_some() && had.is_none());
                    booted.iter().for_each(|boot| api.metrics.booted(boot));
                }
                api.events.take(&change);
            }
            Err(broadcast::error::RecvError::Lagged(_)) => {
                api.events.miss(api.instances.host().records.revision());
            }
            Err(broadcast::error::RecvError::Closed) => return,
        }
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
        .routes(routes!(instances::publish))
        .routes(routes!(instances::unpublish))
        .routes(routes!(instances::wait))
        .routes(routes!(instances::console))
        .routes(routes!(instances::metrics))
        .routes(routes!(instances::exec))
        .routes(routes!(instances::types))
        .routes(routes!(patches::list, patches::create))
        .routes(routes!(patches::get))
        .routes(routes!(patches::cancel))
        .routes(routes!(groups::list, groups::create))
        .routes(routes!(groups::get, groups::modify, groups::delete))
        .routes(routes!(groups::roll))
        .routes(routes!(groups::roll_back))
        .routes(routes!(groups::pause))
        .routes(routes!(groups::resume))
        .routes(routes!(load_balancers::list, load_balancers::create))
        .routes(routes!(load_balancers::get, load_balancers::modify, load_balancers::delete))
        .routes(routes!(tunnel::agent))
        .routes(routes!(tunnel::console))
        .routes(routes!(images::list, images::import))
        .routes(routes!(images::get, images::delete))
        .routes(routes!(images::create))
        .routes(routes!(volumes::list, volumes::create))
        .routes(routes!(volumes::get, volumes::modify, volumes::delete))
        .routes(routes!(volumes::attach))
        .routes(routes!(volumes::detach))
        .routes(routes!(snapshots::list, snapshots::create))
        .routes(routes!(snapshots::get, snapshots::delete))
        .routes(routes!(resources::key_pairs, resources::create_key_pair))
        .routes(routes!(resources::key_pair, resources::delete_key_pair))
        .routes(routes!(resources::networks, resources::create_network))
        .routes(routes!(resources::network, resources::delete_network))
        .routes(routes!(resources::security_groups, resources::create_security_group))
        .routes(routes!(resources::security_group, resources::modify_rules, resources::delete_security_group))
        .routes(routes!(tokens::list, tokens::create))
        .routes(routes!(tokens::delete))
        .routes(routes!(host::show))
        .routes(routes!(host::cordon))
        .routes(routes!(host::uncordon))
        .routes(routes!(host::drain))
        .routes(routes!(events::follow))
        .routes(routes!(metrics::show))
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
        .merge(web::routes())
        .route("/healthz", axum::routing::get(|| async { "ok\n" }))
        .fallback(|| async {
            let message = "there is nothing at this path; /openapi.json lists what there is";
            error::Refusal::new(StatusCode::NOT_FOUND, "InvalidAction", message)
        })
        .method_not_allowed_fallback(|| async {
            let message = "this method is not for this path; /openapi.json lists what there is";
            error::Refusal::new(StatusCode::METHOD_NOT_ALLOWED, "InvalidMethod", message)
        })
        .layer(axum::middleware::from_fn_with_state(api.clone(), auth::authorize))
        .layer(axum::middleware::from_fn_with_state(api.clone(), middleware::frame))
        .layer(DefaultBodyLimit::max(BODY))
        .with_state(api)
}

#[cfg(test)]
mod tests;
