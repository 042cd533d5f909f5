//! `GET /openapi.json`: the table of routes for programs that read it.
//!
//! Made of the table alone: what is not in it is not served. What a route takes and answers is
//! said of each in [`exchange`].

mod bodies;
mod exchange;

use axum::Json;
use utoipa::openapi::path::PathItem;
use utoipa::openapi::path::{
    Operation, OperationBuilder, Parameter, ParameterBuilder, ParameterIn,
};
use utoipa::openapi::request_body::RequestBodyBuilder;
use utoipa::openapi::security::{Http, HttpAuthScheme, SecurityRequirement, SecurityScheme};
use utoipa::openapi::{
    ComponentsBuilder, Content, HttpMethod, InfoBuilder, OpenApi, OpenApiBuilder, PathsBuilder,
    Required, Response, ResponseBuilder,
};

use super::auth::Access;
use super::error::ErrorBody;
use super::routes::{self, Route};
use exchange::{Exchange, JSON, Named, text};

const KEY: &str = "key";

pub async fn get() -> Json<OpenApi> {
    Json(document())
}

pub fn document() -> OpenApi {
    let mut paths = PathsBuilder::new();
    let mut components = ComponentsBuilder::new()
        .security_scheme(KEY, SecurityScheme::Http(Http::new(HttpAuthScheme::Bearer)));
    let error = Named::of::<ErrorBody>();
    for route in routes::table() {
        let exchange = exchange::of(&route.method, route.path);
        let named = exchange.named().chain([&error]).flat_map(Named::all);
        components = components.schemas_from_iter(named.collect::<Vec<_>>());
        let path = route.path.replace("{*", "{");
        let operation = operation(&route, &exchange, &error);
        paths = paths.path(path, PathItem::new(method(&route), operation));
    }
    let info = InfoBuilder::new().title("Strand").version(env!("CARGO_PKG_VERSION")).build();
    OpenApiBuilder::new().info(info).paths(paths).components(Some(components.build())).build()
}

fn method(route: &Route) -> HttpMethod {
    match route.method.as_str() {
        "GET" => HttpMethod::Get,
        "POST" => HttpMethod::Post,
        "PUT" => HttpMethod::Put,
        "PATCH" => HttpMethod::Patch,
        "DELETE" => HttpMethod::Delete,
        other => unreachable!("no route has the method {other}"),
    }
}

fn operation(route: &Route, exchange: &Exchange, error: &Named) -> Operation {
    let answered = |description: &str, contents: &[(&'static str, Named)]| -> Response {
        let answer = ResponseBuilder::new().description(description);
        let add = |answer: ResponseBuilder, (media, named): &(&'static str, Named)| {
            answer.content(*media, Content::new(Some(named.reference())))
        };
        contents.iter().fold(answer, add).build()
    };
    let mut operation = OperationBuilder::new()
        .parameters(Some(parameters(route.path, exchange.query)))
        .response("default", answered("Why not", &[(JSON, error.clone())]));
    for status in exchange.statuses {
        operation = operation.response(*status, answered("What was asked for", &exchange.answers));
    }
    if !exchange.bodies.is_empty() {
        let add = |body: RequestBodyBuilder, (media, named): &(&'static str, Named)| {
            body.content(*media, Content::new(Some(named.reference())))
        };
        let body = exchange.bodies.iter().fold(RequestBodyBuilder::new(), add);
        let required = if exchange.body_required { Required::True } else { Required::False };
        operation = operation.request_body(Some(body.required(Some(required)).build()));
    }
    if route.access != Access::Open {
        operation = operation.security(SecurityRequirement::new(KEY, [] as [&str; 0]));
    }
    operation.build()
}

fn parameters(path: &str, query: &[&str]) -> Vec<Parameter> {
    let names = path.split('/').filter_map(|part| part.strip_prefix('{')?.strip_suffix('}'));
    let in_path = names.map(|name| {
        parameter(name.trim_start_matches('*'), ParameterIn::Path).required(Required::True).build()
    });
    let in_query = query
        .iter()
        .map(|name| parameter(name, ParameterIn::Query).required(Required::False).build());
    in_path.chain(in_query).collect()
}

fn parameter(name: &str, place: ParameterIn) -> ParameterBuilder {
    ParameterBuilder::new().name(name).parameter_in(place).schema(Some(text()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_route_is_in_the_document_and_nothing_else() {
        let document = serde_json::to_value(document()).expect("it is JSON");
        let paths = document["paths"].as_object().expect("it has paths");
        let listed: usize =
            paths.values().map(|item| item.as_object().expect("methods").len()).sum();
        assert_eq!(listed, routes::table().len());
        for route in routes::table() {
            let method = route.method.as_str().to_lowercase();
            let operation = &paths[&route.path.replace("{*", "{")][&method];
            assert!(operation.is_object(), "{method} {} is not there", route.path);
            let is_open = operation.get("security").is_none();
            assert_eq!(is_open, route.access == Access::Open, "{}", route.path);
        }
    }

    #[test]
    fn what_the_document_refers_to_is_in_it() {
        let document = serde_json::to_value(document()).expect("it is JSON");
        let text = document.to_string();
        let references = text.split("\"$ref\":\"#").skip(1);
        for reference in references.map(|rest| rest.split('"').next().expect("a string ends")) {
            assert!(document.pointer(reference).is_some(), "{reference} is not there");
        }
    }
}
