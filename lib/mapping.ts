/**
 * How a customer of Square becomes a row of the table, and a row becomes a new customer.
 *
 * FIELDS shows the two data models side by side; the functions below follow it. Square's fields are
 * described at https://developer.squareup.com/reference/square/objects/Customer
 */
import type { SqlValue } from "sql.js";
import type { Square } from "square"; // Only its types. The package is loaded by the first request.
import type { Contacts } from "./internal/duplicates.ts";
import { INVALID_UTF8, isBlank, normalizeCell, type TextKind } from "./internal/normalize.ts";

/** The table of the customers. To rename it, change this line and schema.sql. */
export const TABLE = "customers";

/** A field of a customer, by its name in the `square` package. A misspelt name does not compile. */
export type SquareField =
  | Exclude<keyof Square.Customer, "address" | "preferences" | "taxIds">
  | `address.${keyof Square.Address}`
  | `preferences.${keyof Square.CustomerPreferences}`
  | `taxIds.${keyof Square.CustomerTaxIds}`;

// The fields that Square accepts for a new customer. It sets the other ones itself.
type CreateField = Extract<
  SquareField,
  keyof Square.BulkCreateCustomerData | `address.${string}` | `taxIds.${string}`
>;

interface PulledField {
  column: string;
  square: SquareField;
  /** How the value is stored. Without a type it is stored as a text. */
  type?: "time" | "integer" | "ids" | "boolean";
  sent?: never;
}

interface SentField {
  column: string;
  square: CreateField;
  /** The column is sent to Square when a row is pushed. */
  sent: true;
  /** How the value is cleaned and checked before it is sent. Without a type: as a line of text. */
  type?: TextKind;
  /** The maximum length that Square documents. */
  maxLength?: number;
}

export type Field = PulledField | SentField;

/**
 * The columns of the table, and the fields of Square that they hold. To store another field, add a line
 * here and a column to schema.sql; a test compares the two. To rename a column, change it in both places.
 * The columns `id` and `version` keep their names, because the type CustomerRow names them.
 */
export const FIELDS: readonly Field[] = [
  { column: "id", square: "id" },
  { column: "created_at", square: "createdAt", type: "time" },
  { column: "updated_at", square: "updatedAt", type: "time" },
  { column: "version", square: "version", type: "integer" },
  { column: "creation_source", square: "creationSource" },
  { column: "given_name", square: "givenName", sent: true, maxLength: 300 },
  { column: "family_name", square: "familyName", sent: true, maxLength: 300 },
  { column: "company_name", square: "companyName", sent: true, maxLength: 500 },
  { column: "nickname", square: "nickname", sent: true, maxLength: 100 },
  { column: "email_address", square: "emailAddress", sent: true, type: "email", maxLength: 254 },
  { column: "phone_number", square: "phoneNumber", sent: true, type: "phone" },
  { column: "birthday", square: "birthday", sent: true, type: "birthday" },
  { column: "note", square: "note", sent: true, type: "note" },
  { column: "reference_id", square: "referenceId", sent: true, type: "reference", maxLength: 100 },
  { column: "tax_ids_eu_vat", square: "taxIds.euVat", sent: true, type: "vat", maxLength: 20 },
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
  { column: "postal_code", square: "address.postalCode", sent: true, type: "postalCode" },
  { column: "country", square: "address.country", sent: true, type: "country" },
  { column: "group_ids", square: "groupIds", type: "ids" },
  { column: "segment_ids", square: "segmentIds", type: "ids" },
  { column: "email_unsubscribed", square: "preferences.emailUnsubscribed", type: "boolean" },
];

/** The columns that hold a field of Square, in the order of the table. */
export const COLUMNS: readonly string[] = FIELDS.map(({ column }) => column);

/** The column that holds a field of Square. Other files ask for it, so that it can be renamed above. */
export function columnOf(field: SquareField): string {
  const column = COLUMN_BY_FIELD.get(field);
  if (column === undefined) throw new Error(`FIELDS has no column for ${field}`);
  return column;
}

const COLUMN_BY_FIELD = new Map(FIELDS.map(({ column, square }) => [square, column]));

/** The columns of FIELDS with the values of one customer. */
export interface CustomerRow {
  id: string;
  version: number | null;
  [column: string]: SqlValue;
}

/** A row as it was read from the table. */
export type LocalRow = Record<string, SqlValue>;

/**
 * Builds the row of a customer that Square returned. A value of an unexpected type is kept as a text: a
 * pull must not fail or lose data because of one odd profile.
 */
export function buildRow(customer: Square.Customer): CustomerRow {
  const row = { ...BLANK_ROW };
  readFields(customer, "", row);
  return row;
}

// A customer has a value for about half of the fields. Going through its own properties takes a third of the
// time of asking for every field.
function readFields(source: object, parent: string, row: CustomerRow): void {
  for (const [name, value] of Object.entries(source)) {
    const field = FIELD_BY_NAME.get(parent + name);
    if (field !== undefined) row[field.column] = buildValue(value, field.type);
    else if (isRecord(value)) readFields(value, `${parent}${name}.`, row);
  }
}

// The SDK renames fields, except a field whose value has an unexpected type: that one keeps the name that
// it has in Square's JSON. Knowing only the SDK's name would lose its value.
const FIELD_BY_NAME = new Map(
  FIELDS.flatMap((field) => [
    [field.square, field] as const,
    [formatWireName(field.square), field] as const,
    [field.square.replace(/[^.]+$/, formatWireName), field] as const, // taxIds.eu_vat
  ]),
);

// Copying an object that has all properties takes half the memory of adding them one by one.
const BLANK_ROW: CustomerRow = {
  ...Object.fromEntries(FIELDS.map(({ column, type }) => [column, buildValue(null, type)])),
  id: "",
  version: null,
};

// The name of a field in Square's JSON: addressLine1 is address_line_1 there.
function formatWireName(sdkName: string): string {
  return sdkName.replace(/[A-Z]|[0-9]+/g, (part) => `_${part.toLowerCase()}`);
}

function isRecord(value: unknown): value is Record<string, unknown> {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}

function buildValue(value: unknown, type: Field["type"]): SqlValue {
  if (type === "boolean") return value === true ? 1 : 0;
  if (type === "ids") return formatIds(value ?? []);
  if (value === undefined || value === null) return null;
  if (type === "integer") return parseInteger(value);
  return type === "time" ? formatTime(value) : formatText(value);
}

// Square returns ids in any order and sometimes twice. Sorted and without repetitions, equal sets are
// equal texts, so another order is not a change of the customer.
function formatIds(value: unknown): string {
  return formatText(Array.isArray(value) ? [...new Set<unknown>(value)].sort() : value);
}

// The SDK returns a bigint.
function parseInteger(value: unknown): number | null {
  const integer = typeof value === "bigint" || typeof value === "string" ? Number(value) : value;
  return typeof integer === "number" && Number.isSafeInteger(integer) ? integer : null;
}

// UTC with three digits for milliseconds, so that the order of the texts is the order of the times. Square
// omits trailing zeros, and as a text `…44Z` would come after `…44.72Z`.
function formatTime(value: unknown): string {
  const text = formatText(value);
  if (STORED_TIME.test(text)) return text;
  const time = /^\d{4}-\d{2}-\d{2}T/.test(text) ? Date.parse(text) : Number.NaN;
  return Number.isNaN(time) ? text : new Date(time).toISOString();
}

const STORED_TIME = /^\d{4}-\d{2}-\d{2}T\d{2}:\d{2}:\d{2}\.\d{3}Z$/;

// SQLite's functions end a text at its first NUL, and half of a surrogate pair is not valid UTF-8.
function formatText(value: unknown): string {
  const text = typeof value === "object" ? formatJson(value) : String(value);
  // The first test is fast. It also finds surrogates in pairs, which are valid.
  return /[\0\uD800-\uDFFF]/.test(text) ? text.replace(/\0|\p{Cs}/gu, "\uFFFD") : text;
}

// JSON.stringify throws for a bigint, which the SDK returns for a number too large for JavaScript.
function formatJson(value: unknown): string {
  return JSON.stringify(value, (_, part) => (typeof part === "bigint" ? String(part) : part));
}

/**
 * True if a stored value is the one that buildRow made. Lists of ids are compared as sets, because an
 * earlier version or another program may have stored them in another order.
 */
export function isSameValue(column: string, stored: SqlValue, built: SqlValue): boolean {
  if (stored === built) return true;
  return ID_COLUMNS.has(column) && typeof stored === "string" && formatStoredIds(stored) === built;
}

const ID_COLUMNS = new Set(FIELDS.flatMap(({ column, type }) => (type === "ids" ? column : [])));

function formatStoredIds(cell: string): string | undefined {
  try {
    return formatIds(JSON.parse(cell));
  } catch {
    return undefined; // Not JSON, so it is not a list of ids.
  }
}

/** Collects rows by customer id. If a customer arrives twice, the row with the higher version is kept. */
export function keepLatestVersion(rows: Map<string, CustomerRow>, row: CustomerRow): void {
  const kept = rows.get(row.id);
  if (kept === undefined || (row.version ?? 0) >= (kept.version ?? 0)) rows.set(row.id, row);
}

/** The data of a new customer, for CreateCustomer and BulkCreateCustomers. */
export type NewCustomer = Omit<Square.CreateCustomerRequest, "idempotencyKey">;

// Square requires one of these fields for a new customer.
const PUBLIC_FIELDS: readonly SquareField[] = [
  "givenName",
  "familyName",
  "companyName",
  "emailAddress",
  "phoneNumber",
];

/** True for a customer that Square's search returns and counts. It omits profiles with only other fields. */
export function hasPublicField(row: LocalRow): boolean {
  return PUBLIC_FIELDS.some((field) => !isBlank(String(row[columnOf(field)] ?? "")));
}

/**
 * Builds the data of a new customer from a row, and lists why Square would reject it. A blank column is
 * left out, because Square accepts a missing field but not an empty one.
 * @param invalidUtf8Columns columns whose bytes are not valid UTF-8 (see isValidUtf8). Their text has lost
 * characters and must not be sent.
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
    const { column, square, type = "line", maxLength } = field;
    const { text, problem } = invalidUtf8Columns.has(column)
      ? { problem: INVALID_UTF8 }
      : normalizeCell(row[column], type, maxLength);
    if (problem !== undefined) problems.push(`${column} ${problem}`);
    if (!text) continue;
    filled.add(square);
    setField(customer, square, text);
  }
  if (problems.length === 0 && !PUBLIC_FIELDS.some((field) => filled.has(field)))
    problems.push(`one of ${PUBLIC_FIELDS.map(columnOf).join(", ")} is needed`);
  return { customer, problems };
}

function setField(customer: NewCustomer, field: CreateField, text: string): void {
  const [first = "", second] = field.split(".");
  if (second === undefined) Object.assign(customer, { [first]: text });
  else if (first === "address") customer.address = { ...customer.address, [second]: text };
  else customer.taxIds = { ...customer.taxIds, [second]: text };
}

/** The values by which a customer is recognized, cleaned as they are sent to Square. */
export function findContacts(row: LocalRow): Contacts {
  return {
    emailAddress: cleanColumn(row, "emailAddress", "email"),
    phoneNumber: cleanColumn(row, "phoneNumber", "phone"),
    referenceId: cleanColumn(row, "referenceId", "reference"),
  };
}

// A value that our checks reject, for example of a customer that Square has known for long, is compared
// as it is.
function cleanColumn(row: LocalRow, field: SquareField, kind: TextKind): string {
  const value = row[columnOf(field)] ?? "";
  return normalizeCell(value, kind).text ?? String(value).trim();
}

/**
 * The column that an error of Square is about, by the error's `field`, for example `address.country` or
 * `customers.<idempotency key>.address.country`. Undefined for an error that is not about one column.
 */
export function findColumnOfError(field: string): string | undefined {
  const isMeant = ({ square }: Field) => `.${field}`.endsWith(`.${formatWireName(square)}`);
  return FIELDS.filter(isMeant).at(0)?.column;
}
