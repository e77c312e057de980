/**
 * Converts a customer of Square to a row of the table. prepare.ts does the reverse.
 * Square describes its fields at https://developer.squareup.com/reference/square/objects/Customer
 */
import type { SqlValue } from "sql.js";
import type { Square } from "square"; // Types only: the package itself is loaded by client.ts.
import { cleanValue, type TextKind } from "./checks.ts";
import type { Row } from "./internal/sql.ts";

/** A customer's field in the `square` package. A field inside an object has a dot. */
export type SquareField =
  | keyof Square.Customer
  | `address.${keyof Square.Address}`
  | `preferences.${keyof Square.CustomerPreferences}`
  | `taxIds.${keyof Square.CustomerTaxIds}`;

export interface Field {
  column: string;
  square: SquareField;
  /** How the value is stored; by default as text. */
  storedAs?: "time" | "integer" | "ids" | "boolean";
  /** For a field that is sent when a row is pushed: how its text is cleaned and checked. */
  sent?: TextKind;
}

/**
 * The columns of the table, and the fields of Square that they hold.
 *
 * To store another field, add a line here and a column to schema.sql. If the field is sent, add it
 * to the trigger in schema.sql too.
 */
export const FIELDS: readonly Field[] = [
  { column: "id", square: "id" },
  { column: "created_at", square: "createdAt", storedAs: "time" },
  { column: "updated_at", square: "updatedAt", storedAs: "time" },
  { column: "version", square: "version", storedAs: "integer" },
  { column: "creation_source", square: "creationSource" },
  { column: "given_name", square: "givenName", sent: "text" },
  { column: "family_name", square: "familyName", sent: "text" },
  { column: "company_name", square: "companyName", sent: "text" },
  { column: "nickname", square: "nickname", sent: "text" },
  { column: "email_address", square: "emailAddress", sent: "email" },
  { column: "phone_number", square: "phoneNumber", sent: "phone" },
  { column: "birthday", square: "birthday", sent: "birthday" },
  { column: "note", square: "note", sent: "text" },
  { column: "reference_id", square: "referenceId", sent: "reference" },
  { column: "tax_ids_eu_vat", square: "taxIds.euVat", sent: "code" },
  { column: "address_line_1", square: "address.addressLine1", sent: "text" },
  { column: "address_line_2", square: "address.addressLine2", sent: "text" },
  { column: "address_line_3", square: "address.addressLine3", sent: "text" },
  { column: "locality", square: "address.locality", sent: "text" },
  { column: "sublocality", square: "address.sublocality", sent: "text" },
  {
    column: "administrative_district_level_1",
    square: "address.administrativeDistrictLevel1",
    sent: "text",
  },
  { column: "postal_code", square: "address.postalCode", sent: "code" },
  { column: "country", square: "address.country", sent: "country" },
  { column: "group_ids", square: "groupIds", storedAs: "ids" },
  { column: "segment_ids", square: "segmentIds", storedAs: "ids" },
  { column: "email_unsubscribed", square: "preferences.emailUnsubscribed", storedAs: "boolean" },
];

export const COLUMNS: readonly string[] = FIELDS.map(({ column }) => column);

/** The columns in which an edit of a person counts. */
export const EDITABLE_COLUMNS: readonly string[] = FIELDS.filter(
  ({ column, sent }) => sent !== undefined || column === "email_unsubscribed",
).map(({ column }) => column);

export interface CustomerRow extends Row {
  id: string;
  version: number | null;
}

// For example ["address", "country"].
const PATHS = FIELDS.map((field) => ({ ...field, path: field.square.split(".") }));

// Copying an object that has all columns takes half the memory of adding the columns one by one.
const BLANK_ROW: CustomerRow = {
  ...Object.fromEntries(COLUMNS.map((column) => [column, null])),
  id: "",
  version: null,
};

export function buildRow(customer: Square.Customer): CustomerRow {
  const row = { ...BLANK_ROW };
  for (const { column, storedAs, path } of PATHS) {
    let value: unknown = customer;
    for (const name of path) value = Object(value)[name]; // Object(undefined) is {}.
    row[column] = buildValue(value, storedAs);
  }
  return row;
}

function buildValue(value: unknown, storedAs: Field["storedAs"]): SqlValue {
  if (storedAs === "boolean") return value === true ? 1 : 0;
  // Square returns ids in any order, and sometimes twice. Another order must not look like a change.
  if (storedAs === "ids")
    return JSON.stringify(Array.isArray(value) ? [...new Set<unknown>(value)].sort() : []);
  if (value === undefined || value === null) return null;
  if (storedAs === "integer") return Number(value); // the SDK returns integers as bigint
  const text = String(value);
  if (storedAs !== "time" || Number.isNaN(Date.parse(text))) return text;
  // Times are stored as UTC with three digits for milliseconds, so that the order of the texts is
  // the order of the times. Square omits trailing zeros, and `…44Z` would come after `…44.72Z`.
  return new Date(text).toISOString();
}

export function keepLatestVersion(rows: Map<string, CustomerRow>, row: CustomerRow): void {
  const kept = rows.get(row.id);
  if (kept === undefined || (row.version ?? 0) >= (kept.version ?? 0)) rows.set(row.id, row);
}

/**
 * Lists the columns in which a person's value is replaced by that of a customer. Values are compared
 * as they are sent, and a blank one is not a value.
 */
export function listReplacedColumns(row: Row, customer: CustomerRow): string[] {
  const clean = (value: SqlValue | undefined, kind: TextKind): string =>
    cleanValue(value, kind).text ?? String(value);
  const columns: string[] = [];
  for (const { column, sent } of FIELDS) {
    if (sent === undefined) continue;
    const value = clean(row[column], sent);
    if (value !== "" && value !== clean(customer[column], sent)) columns.push(column);
  }
  if (losesOptOut(row, customer)) columns.push("email_unsubscribed");
  return columns;
}

/**
 * True if the customer wants no marketing email. Any value except 0 and blank counts, for example
 * `yes` from a CSV, because sending email to that customer would be the worse mistake.
 */
export function hasOptOut(row: Row): boolean {
  return !["", "0"].includes(String(row.email_unsubscribed ?? "").trim());
}

export function losesOptOut(row: Row, customer: CustomerRow): boolean {
  return hasOptOut(row) && !hasOptOut(customer);
}
