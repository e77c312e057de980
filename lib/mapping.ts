/**
 * Converts a customer of Square to a row of the table, and a row to a new customer.
 *
 * FIELDS lists the columns next to the fields of Square, and all functions below use this list.
 * Square describes its fields at https://developer.squareup.com/reference/square/objects/Customer
 */
import type { SqlValue } from "sql.js";
import type { Square } from "square"; // Types only: the package itself is loaded by client.ts.
import type { ComparedValues } from "./internal/duplicates.ts";
import { isRecord } from "./internal/json.ts";
import { normalizeCell, type TextKind } from "./internal/normalize.ts";
import { INVALID_UTF8 } from "./internal/utf8.ts";

/** The table of the customers. To rename it, change this line and schema.sql. */
export const TABLE = "customers";

// A cell holds a time if it is a text that begins with a date after the year 999. Any other value
// counts as NULL, for example an empty text from a CSV, a 0 that means "not deleted", or
// 0000-00-00. Both constants match the same texts.
const GLOB_TIME = "GLOB '[1-9][0-9][0-9][0-9]-[0-9][0-9]-[0-9][0-9]*'";
const TIME = /^[1-9][0-9]{3}-[0-9]{2}-[0-9]{2}/;

/** The SQL condition for rows that are not marked as deleted. */
export const NOT_DELETED = `coalesce(deleted_at, '') NOT ${GLOB_TIME}`;

/** The SQL condition for rows that were saved from a reply of Square. */
export const IS_SYNCED = `coalesce(synced_at, '') ${GLOB_TIME}`;

/** True if a cell holds a time. It is the same test as in NOT_DELETED and IS_SYNCED. */
export function isTime(value: SqlValue | undefined): boolean {
  return typeof value === "string" && TIME.test(value);
}

/**
 * The name of a customer's field in the `square` package, for example `givenName`. A field inside
 * an object has a dot, for example `address.country`. TypeScript rejects a name that does not
 * exist.
 */
export type SquareField =
  | Exclude<keyof Square.Customer, "address" | "preferences" | "taxIds">
  | `address.${keyof Square.Address}`
  | `preferences.${keyof Square.CustomerPreferences}`
  | `taxIds.${keyof Square.CustomerTaxIds}`;

// The fields that Square accepts for a new customer. Square sets the other fields itself.
type CreateField = Extract<
  SquareField,
  keyof Square.BulkCreateCustomerData | `address.${string}` | `taxIds.${string}`
>;

interface PulledField {
  column: string;
  square: SquareField;
  /** How the value is stored; by default as text. */
  storedAs?: "time" | "integer" | "ids" | "boolean";
  // Only a SentField has these. They are declared so that code can read them on any Field.
  sent?: never;
  kind?: never;
  maxLength?: never;
}

/** A field that is pulled, and also sent to Square when a row is pushed. It is stored as text. */
interface SentField {
  column: string;
  square: CreateField;
  sent: true;
  /** How the value is cleaned and checked before it is sent; by default as one line of text. */
  kind?: TextKind;
  /** The maximum length that Square documents. */
  maxLength?: number;
  storedAs?: never;
}

export type Field = PulledField | SentField;

/**
 * The columns of the table, and the fields of Square that they hold.
 *
 * To store another field, add a line here and a column to schema.sql. To rename a column, change it
 * in both places. Only the columns `id` and `version` must keep their names, because the scripts
 * use them.
 */
export const FIELDS: readonly Field[] = [
  { column: "id", square: "id" },
  { column: "created_at", square: "createdAt", storedAs: "time" },
  { column: "updated_at", square: "updatedAt", storedAs: "time" },
  { column: "version", square: "version", storedAs: "integer" },
  { column: "creation_source", square: "creationSource" },
  { column: "given_name", square: "givenName", sent: true, maxLength: 300 },
  { column: "family_name", square: "familyName", sent: true, maxLength: 300 },
  { column: "company_name", square: "companyName", sent: true, maxLength: 500 },
  { column: "nickname", square: "nickname", sent: true, maxLength: 100 },
  { column: "email_address", square: "emailAddress", sent: true, kind: "email", maxLength: 254 },
  { column: "phone_number", square: "phoneNumber", sent: true, kind: "phone" },
  { column: "birthday", square: "birthday", sent: true, kind: "birthday" },
  { column: "note", square: "note", sent: true, kind: "note" },
  { column: "reference_id", square: "referenceId", sent: true, kind: "reference", maxLength: 100 },
  { column: "tax_ids_eu_vat", square: "taxIds.euVat", sent: true, kind: "vat", maxLength: 20 },
  { column: "address_line_1", square: "address.addressLine1", sent: true },
  { column: "address_line_2", square: "address.addressLine2", sent: true },
  { column: "address_line_3", square: "address.addressLine3", sent: true },
  { column: "locality", square: "address.locality", sent: true },
  { column: "sublocality", square: "address.sublocality", sent: true },
  {
    column: "administrative_district_level_1",
    square: "address.administrativeDistrictLevel1",
    sent: true,
  },
  { column: "postal_code", square: "address.postalCode", sent: true, kind: "postalCode" },
  { column: "country", square: "address.country", sent: true, kind: "country" },
  { column: "group_ids", square: "groupIds", storedAs: "ids" },
  { column: "segment_ids", square: "segmentIds", storedAs: "ids" },
  { column: "email_unsubscribed", square: "preferences.emailUnsubscribed", storedAs: "boolean" },
];

/**
 * The name that each column has in this kit if it is not renamed: the name of its field in Square's
 * API, for example `email_address`. init-db uses it to recognize a column that was renamed only in
 * FIELDS.
 */
export const API_NAMES: ReadonlyMap<string, string> = new Map(
  FIELDS.map(({ column, square }) => [
    column,
    formatSnakeCase(square)
      .replace(/^(address|preferences)\./, "")
      .replace(".", "_"),
  ]),
);

/** The columns of FIELDS, in the order of the table. */
export const COLUMNS: readonly string[] = FIELDS.map(({ column }) => column);

const COLUMN_BY_FIELD = new Map(FIELDS.map(({ column, square }) => [square, column]));

/**
 * Returns the column that holds a field of Square. The other files call it instead of naming the
 * column, so that a column has to be renamed only in FIELDS and schema.sql.
 */
export function columnOf(field: SquareField): string {
  const column = COLUMN_BY_FIELD.get(field);
  if (column === undefined) throw new Error(`FIELDS has no column for ${field}`);
  return column;
}

/** These columns appear in the SQL of other files. */
export const REFERENCE_ID = columnOf("referenceId");
export const CREATED_AT = columnOf("createdAt");
export const EMAIL_UNSUBSCRIBED = columnOf("preferences.emailUnsubscribed");

// ---- From a customer of Square to a row ----

/** A row for the columns of FIELDS, built from a customer of Square. */
export interface CustomerRow {
  id: string;
  version: number | null;
  [column: string]: SqlValue;
}

/** A row that was read from the table. */
export type LocalRow = Record<string, SqlValue>;

// Finds a field by its name in a reply. Some fields can have several names; see listNames.
const FIELD_BY_NAME = new Map<string, Field>();
for (const field of FIELDS) {
  for (const name of listNames(field)) FIELD_BY_NAME.set(name, field);
}

// A fast test for formatText: a text without NUL and without surrogates needs no repair.
const MAY_NEED_REPAIR = /[\0\uD800-\uDFFF]/;

// A NUL, or a surrogate without its partner: with the flag u, \p{Cs} does not match complete pairs.
const NUL_OR_HALF_PAIR = /\0|\p{Cs}/gu;

// A row without values. Copying an object that has all columns takes half the memory of adding the
// columns one by one.
const BLANK_ROW: CustomerRow = {
  ...Object.fromEntries(FIELDS.map(({ column, storedAs }) => [column, buildValue(null, storedAs)])),
  id: "",
  version: null,
};

const STORED_TIME = /^\d{4}-\d{2}-\d{2}T\d{2}:\d{2}:\d{2}\.\d{3}Z$/;

const ID_COLUMNS = new Set(
  FIELDS.filter(({ storedAs }) => storedAs === "ids").map(({ column }) => column),
);

/**
 * Builds the row of a customer that Square returned. A pull must not fail because of one unusual
 * customer. So a value of an unexpected type is kept as text. Exceptions: in an integer column it
 * becomes NULL, and in a boolean column 0. A text in place of an object, such as the address, is
 * ignored.
 */
export function buildRow(customer: Square.Customer): CustomerRow {
  const row = { ...BLANK_ROW };
  copyFields(customer, "", row);
  return row;
}

/**
 * Copies the fields of an object to the columns of a row. A customer has a value for about half of
 * the fields, so going through its properties takes a third of the time of looking for each field.
 * @param prefix "" for the customer itself, "address." for its address
 */
function copyFields(source: object, prefix: string, row: CustomerRow): void {
  for (const [name, value] of Object.entries(source)) {
    const field = FIELD_BY_NAME.get(prefix + name);
    if (field !== undefined) row[field.column] = buildValue(value, field.storedAs);
    else if (isRecord(value)) copyFields(value, `${prefix}${name}.`, row);
  }
}

/**
 * Lists the names under which a field can arrive. If a value in a reply has an unexpected type, the
 * SDK leaves some names in snake_case.
 */
function listNames({ square }: Field): string[] {
  return [
    square, // the normal case: taxIds.euVat
    formatSnakeCase(square), // no part is renamed: tax_ids.eu_vat
    square.replace(/[^.]+$/, formatSnakeCase), // the last part is not renamed: taxIds.eu_vat
  ];
}

// `address.addressLine1` is `address.address_line_1` in Square's JSON.
function formatSnakeCase(sdkName: string): string {
  return sdkName.replace(/[A-Z]|[0-9]+/g, (part) => `_${part.toLowerCase()}`);
}

function buildValue(value: unknown, storedAs: Field["storedAs"]): SqlValue {
  if (storedAs === "boolean") return value === true ? 1 : 0;
  if (storedAs === "ids") return formatIds(value ?? []);
  if (value === undefined || value === null) return null;
  if (storedAs === "integer") return parseInteger(value);
  return storedAs === "time" ? normalizeTime(value) : formatText(value);
}

// Square returns ids in any order, and sometimes twice. Sort them and remove repetitions, so that
// the same ids always give the same text. Otherwise another order would look like a change.
function formatIds(value: unknown): string {
  return formatText(Array.isArray(value) ? [...new Set<unknown>(value)].sort() : value);
}

// The SDK returns integers as bigint. A number that JavaScript cannot hold exactly becomes null.
function parseInteger(value: unknown): number | null {
  const isDigits = typeof value === "string" && /^-?\d+$/.test(value);
  const integer = typeof value === "bigint" || isDigits ? Number(value) : value;
  return typeof integer === "number" && Number.isSafeInteger(integer) ? integer : null;
}

// Times are stored as UTC with three digits for milliseconds, so that the order of the texts is the
// order of the times. Square omits trailing zeros, and the text `…44Z` would come after `…44.72Z`.
function normalizeTime(value: unknown): string {
  const text = formatText(value);
  if (STORED_TIME.test(text)) return text;
  const time = /^\d{4}-\d{2}-\d{2}T/.test(text) ? Date.parse(text) : Number.NaN;
  return Number.isNaN(time) ? text : new Date(time).toISOString();
}

// Formats any value as a text that SQLite stores unchanged. SQLite's functions read a text only up
// to its first NUL character, and one half of a surrogate pair is not valid UTF-8. Both become
// U+FFFD.
function formatText(value: unknown): string {
  const text = typeof value === "object" ? formatJson(value) : String(value);
  return MAY_NEED_REPAIR.test(text) ? text.replace(NUL_OR_HALF_PAIR, "\uFFFD") : text;
}

// The SDK returns a large number as bigint, for which JSON.stringify throws an error.
function formatJson(value: unknown): string {
  return JSON.stringify(value, (_, part) => (typeof part === "bigint" ? String(part) : part));
}

/**
 * Compares a stored value with one that {@linkcode buildRow} built. Lists of ids are compared as
 * sets, because another program may have stored the same ids in another order.
 */
export function isSameValue(column: string, stored: SqlValue, built: SqlValue): boolean {
  if (stored === built) return true;
  // A TEXT column returns a number as a text.
  if (typeof built === "number" && typeof stored === "string") return stored === String(built);
  return ID_COLUMNS.has(column) && typeof stored === "string" && formatStoredIds(stored) === built;
}

// Formats the ids of a cell as formatIds does; undefined if the cell is not JSON.
function formatStoredIds(cell: string): string | undefined {
  try {
    return formatIds(JSON.parse(cell));
  } catch {
    return undefined;
  }
}

/** Adds a row to `rows`, unless a higher version of the same customer is there already. */
export function keepLatestVersion(rows: Map<string, CustomerRow>, row: CustomerRow): void {
  const kept = rows.get(row.id);
  if (kept === undefined || (row.version ?? 0) >= (kept.version ?? 0)) rows.set(row.id, row);
}

// ---- From a row to a new customer ----

/** The data of a new customer, for CreateCustomer and BulkCreateCustomers. */
export type NewCustomer = Omit<Square.CreateCustomerRequest, "idempotencyKey">;

// Square requires one of these for a new customer, and its search omits profiles that have none.
const IDENTIFYING_FIELDS: readonly SquareField[] = [
  "givenName",
  "familyName",
  "companyName",
  "emailAddress",
  "phoneNumber",
];

/** True if Square's search returns and counts the customer of this row. */
export function hasIdentifyingField(row: LocalRow): boolean {
  return IDENTIFYING_FIELDS.some((field) => (row[columnOf(field)] ?? "") !== "");
}

/**
 * Builds the data of a new customer from a row, and lists the reasons why Square would reject it. A
 * blank column is left out, because Square accepts a missing field but not an empty one.
 * @param invalidUtf8Columns the columns whose bytes are not valid UTF-8. They are not sent, because
 *   the text that was read from them has lost characters.
 */
export function buildCustomer(
  row: LocalRow,
  invalidUtf8Columns: ReadonlySet<string> = new Set(),
): { customer: NewCustomer; problems: string[] } {
  const customer: NewCustomer = {};
  const problems: string[] = [];
  const filled = new Set<SquareField>();
  for (const field of FIELDS) {
    if (!field.sent) continue;
    const { column, square, kind = "line", maxLength } = field;
    if (invalidUtf8Columns.has(column)) {
      problems.push(`${column} ${INVALID_UTF8}`);
      continue;
    }
    // text is empty for a blank cell, and undefined for a value that cannot be sent.
    const { text, problem } = normalizeCell(row[column], kind, maxLength);
    if (problem !== undefined) problems.push(`${column} ${problem}`);
    if (text === undefined || text === "") continue;
    filled.add(square);
    setField(customer, square, text);
  }
  // Check this only without other problems. Otherwise the row can have an identifying field that is
  // invalid, and "is needed" would mislead.
  if (problems.length === 0 && !IDENTIFYING_FIELDS.some((field) => filled.has(field)))
    problems.push(`one of ${IDENTIFYING_FIELDS.map(columnOf).join(", ")} is needed`);
  return { customer, problems };
}

function setField(customer: NewCustomer, field: CreateField, text: string): void {
  const [first = "", second] = field.split(".");
  if (second === undefined) Object.assign(customer, { [first]: text });
  else if (first === "address") customer.address = { ...customer.address, [second]: text };
  else customer.taxIds = { ...customer.taxIds, [second]: text }; // the only other object
}

/** Builds the values that are compared to find possible duplicates. They are cleaned as for sending. */
export function buildComparedValues(row: LocalRow): ComparedValues {
  return {
    emailAddress: cleanColumn(row, "emailAddress", "email"),
    phoneNumber: cleanColumn(row, "phoneNumber", "phone"),
    referenceId: cleanColumn(row, "referenceId", "reference"),
  };
}

// A customer that exists in Square can have a value that our validation rejects. Such a value is
// compared without cleaning.
function cleanColumn(row: LocalRow, field: SquareField, kind: TextKind): string {
  const value = row[columnOf(field)] ?? "";
  return normalizeCell(value, kind).text ?? String(value).trim();
}

/**
 * Finds the column that an error of Square is about.
 * @param field the error's `field`, for example `address.country`, or in a reply to
 *   BulkCreateCustomers `customers.<idempotency key>.address.country`
 * @returns undefined for an error that is not about one column
 */
export function findColumnOfError(field: string): string | undefined {
  // The dots make only whole names match: an error about `sublocality` is not about `locality`.
  return FIELDS.find(({ square }) => `.${field}`.endsWith(`.${formatSnakeCase(square)}`))?.column;
}
