//! `/v1/contexts`: an ordered set of chunks with flags, and a conversation.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;

use super::asking::blocking;
use super::auth::{Access, Principal, Tenant};
use super::body::Asked;
use super::error::ApiError;
use super::library::contexts::{self, Edit};
use super::library::{Shelf, page};
use super::query::{MaybeFields, Names, Params};
use super::state::{App, Server};
use super::wire::chunks::{Deleted, Page, checked_name};
use super::wire::contexts::{ContextChange, ContextObject, ContextSummary};

/// Whose contexts are meant: one's own, for an admin also another tenant's, by `?tenant=NAME`.
struct Whose(Tenant);

impl Whose {
    fn new(principal: Principal, params: &Params) -> Result<Self, ApiError> {
        match params.text("tenant") {
            Some(name) if name != principal.tenant.0 => {
                if !principal.may(Access::Admin) {
                    let message = "another tenant's contexts need the role admin";
                    return Err(ApiError::forbidden(message));
                }
                Ok(Self(Tenant(name.to_owned())))
            }
            _ => Ok(Self(principal.tenant)),
        }
    }

    fn shelf(&self, server: &Server) -> Result<Arc<Shelf>, ApiError> {
        server.library.shelf(&self.0)
    }
}

type Made = (StatusCode, Json<ContextObject>);

pub async fn create(
    State(app): State<App>,
    principal: Principal,
    params: Params,
    Asked(change): Asked<ContextChange>,
) -> Result<Made, ApiError> {
    let whose = Whose::new(principal, &params)?;
    let made = blocking(&app, move |server| contexts::make(server, &*whose.shelf(server)?, change));
    Ok((StatusCode::CREATED, Json(made.await?)))
}

pub async fn list(
    State(app): State<App>,
    principal: Principal,
    params: Params,
) -> Result<Json<Page<ContextSummary>>, ApiError> {
    let whose = Whose::new(principal, &params)?;
    blocking(&app, move |server| {
        let all = contexts::list(&*whose.shelf(server)?)?;
        page(all, &params, |context| context.id.clone()).map(Json)
    })
    .await
}

pub async fn get(
    State(app): State<App>,
    principal: Principal,
    params: Params,
    Names(id): Names<String>,
) -> Result<Json<ContextObject>, ApiError> {
    let whose = Whose::new(principal, &params)?;
    blocking(&app, move |server| contexts::show(server, &*whose.shelf(server)?, &id).map(Json))
        .await
}

pub async fn change(
    State(app): State<App>,
    principal: Principal,
    params: Params,
    Names(id): Names<String>,
    Asked(change): Asked<ContextChange>,
) -> Result<Json<ContextObject>, ApiError> {
    edit(app, Whose::new(principal, &params)?, id, Edit::Change(Box::new(change))).await
}

pub async fn forget(
    State(app): State<App>,
    principal: Principal,
    params: Params,
    Names(id): Names<String>,
) -> Result<Json<Deleted>, ApiError> {
    let whose = Whose::new(principal, &params)?;
    blocking(&app, move |server| {
        contexts::forget(&whose.shelf(server)?, &id)?;
        Ok(Json(Deleted { id, object: "context.deleted", deleted: true }))
    })
    .await
}

pub async fn activate(
    State(app): State<App>,
    principal: Principal,
    params: Params,
    Names((id, chunk)): Names<(String, String)>,
) -> Result<Json<ContextObject>, ApiError> {
    let switch = Edit::Switch { chunk, active: true };
    edit(app, Whose::new(principal, &params)?, id, switch).await
}

pub async fn deactivate(
    State(app): State<App>,
    principal: Principal,
    params: Params,
    Names((id, chunk)): Names<(String, String)>,
) -> Result<Json<ContextObject>, ApiError> {
    let switch = Edit::Switch { chunk, active: false };
    edit(app, Whose::new(principal, &params)?, id, switch).await
}

pub async fn put(
    State(app): State<App>,
    principal: Principal,
    params: Params,
    Names((id, chunk)): Names<(String, String)>,
    MaybeFields(mut fields): MaybeFields,
) -> Result<Json<ContextObject>, ApiError> {
    let active = fields.flag("active")?.unwrap_or(true);
    let position = fields.count("position", 0..=usize::MAX)?;
    let put = Edit::Put { chunk, active, position };
    edit(app, Whose::new(principal, &params)?, id, put).await
}

pub async fn remove(
    State(app): State<App>,
    principal: Principal,
    params: Params,
    Names((id, chunk)): Names<(String, String)>,
) -> Result<Json<ContextObject>, ApiError> {
    edit(app, Whose::new(principal, &params)?, id, Edit::Remove { chunk }).await
}

pub async fn fork(
    State(app): State<App>,
    principal: Principal,
    params: Params,
    Names(id): Names<String>,
    MaybeFields(mut fields): MaybeFields,
) -> Result<Made, ApiError> {
    let whose = Whose::new(principal, &params)?;
    let name = checked_name(fields.text("name")?)?;
    let forked =
        blocking(&app, move |server| contexts::fork(server, &whose.shelf(server)?, &id, name));
    Ok((StatusCode::CREATED, Json(forked.await?)))
}

async fn edit(
    app: App,
    whose: Whose,
    id: String,
    edit: Edit,
) -> Result<Json<ContextObject>, ApiError> {
    blocking(&app, move |server| contexts::edit(server, &whose.shelf(server)?, &id, edit).map(Json))
        .await
}
